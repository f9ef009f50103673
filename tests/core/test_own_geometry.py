"""Targets and pseudo-labels where strong views have a geometry of their own."""

import copy
from dataclasses import replace

import pytest
import torch
from fake_detector import BOXES, LOSS_NAMES, NUM_CLASSES, FakeDetector
from fake_training import make_batch, train, trained, training_step

from ssod.core.contrastive import ClassAwareContrast
from ssod.core.daso import DASO
from ssod.core.filters import FixedThreshold
from ssod.core.label_match import LabelMatch
from ssod.core.method import Method, Step
from ssod.core.structures import Layer, PseudoLabels, Targets, Views
from ssod.core.teacher_student import TeacherStudent, transfer

NOTHING = torch.empty(0, 4)


class Looker(Method):
    """Keeps the record of the step."""

    group = "LOOKER"

    def losses(self, step):
        self.step = replace(step)
        return {}


def _model(method=None, **kwargs):
    torch.manual_seed(0)
    arguments = {"burn_in_iters": 0, "ema_decay": 0.75, "unsup_loss_weight": 1.0}
    methods = {"LOOKER": method} if method else None
    arguments |= {"methods": methods, "unsup_box_losses": True, **kwargs}
    return TeacherStudent(FakeDetector(), FixedThreshold(0.0), **arguments)


def _shift(x, y):
    return torch.tensor([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _own_geometry(batch):
    """Moved right, not moved, and erased nearly as a whole."""
    to_strong = torch.stack([_shift(2.0, 0.0), _shift(0.0, 0.0), _shift(0.0, 0.0)])
    erased = [NOTHING, NOTHING, torch.tensor([[0.0, 0.0, 4.0, 3.5]])]
    batch.unlabeled = replace(batch.unlabeled, to_strong=to_strong, erased=erased)
    return batch


def _labels(boxes):
    count = len(boxes)
    ramp = torch.arange(count).float()
    probs = torch.full((count, NUM_CLASSES + 1), 0.1) + ramp[:, None]
    return PseudoLabels(
        boxes, ramp.long() % NUM_CLASSES, ramp, ramp + 1, ramp + 2, probs, ramp % 2 == 0
    )


def _step(views, labels):
    return Step(None, None, 0, None, unlabeled=views, pseudo_labels=labels)


def test_without_a_geometry_of_their_own_labels_stay_and_there_is_one_layer():
    views = make_batch().unlabeled
    labels = [_labels(BOXES[:count]) for count in (3, 0, 1)]
    step = _step(views, list(labels))
    transfer(step)
    assert all(found is given for found, given in zip(step.pseudo_labels, labels, strict=True))
    assert step.unlabeled.layers == [Layer([0, 1, 2])]


def test_labels_move_and_those_of_which_too_little_is_left_go_with_all_their_fields():
    views = _own_geometry(make_batch()).unlabeled
    labels = [_labels(BOXES) for _ in range(3)]
    step = _step(views, list(labels))
    transfer(step)
    # Of the second box one column of three is in the view, and of the last half.
    kept = [[0, 1, 2], [0, 1, 2], []]
    moved = [
        [[2.0, 0.0, 4.0, 2.0], [3.0, 0.0, 4.0, 2.75], [2.0, 1.0, 4.0, 4.0]],
        BOXES.tolist(),
        [],
    ]
    for found, given, rows, boxes in zip(step.pseudo_labels, labels, kept, moved, strict=True):
        assert found.boxes.tolist() == boxes
        assert torch.equal(found.found, given.boxes[rows])
        expected = given[torch.tensor(rows, dtype=torch.int64)]
        for name in ("classes", "scores", "weights", "box_weights", "class_probs", "reliable"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    (layer,) = step.unlabeled.layers
    assert layer.images == [0, 1, 2] and torch.equal(layer.matrices, views.to_strong)


def test_boxes_of_strong_views_go_back_to_the_weak_ones():
    views = _own_geometry(make_batch()).unlabeled
    step = _step(views, [_labels(BOXES) for _ in range(3)])
    transfer(step)
    (layer,) = step.unlabeled.layers
    back = step.weak_boxes(layer, [labels.boxes for labels in step.pseudo_labels])
    for boxes, labels, matrix in zip(back, step.pseudo_labels, views.to_strong, strict=True):
        expected = labels.boxes - torch.tensor([matrix[0, 2], 0.0] * 2)
        torch.testing.assert_close(boxes, expected.float())


def test_no_labels_at_all():
    step = _step(_own_geometry(make_batch()).unlabeled, [_labels(NOTHING) for _ in range(3)])
    transfer(step)
    assert [labels.boxes.shape for labels in step.pseudo_labels] == [(0, 4)] * 3


def _losses(detector, images, targets):
    detector = copy.deepcopy(detector)
    batch = detector.preprocess(images)
    return detector.losses(detector.features(batch), batch, targets).losses


def test_the_student_learns_what_is_left_in_the_strong_views():
    looker = Looker()
    model = _model(looker)
    train(training_step(model), 3)
    batch = _own_geometry(make_batch(3))
    losses = model(batch)
    labels = looker.step.pseudo_labels
    assert [len(p) for p in labels] == [3, 3, 0] and len(looker.step.detections[2]) == 3
    assert torch.equal(labels[0].found, looker.step.detections[0].boxes)
    assert not torch.equal(labels[0].found, labels[0].boxes)
    expected = _losses(model.student, batch.unlabeled.strong, [p.to_targets() for p in labels])
    for name in LOSS_NAMES:
        torch.testing.assert_close(losses[f"{name}_unsup"], expected[name])
    assert model.metrics["pseudo/num_per_image"] == 2


def test_the_same_place_gives_the_same_losses():
    model = trained(_model(), 3)
    plain, same = make_batch(3), make_batch(3)
    same.unlabeled.to_strong = _shift(0.0, 0.0).repeat(3, 1, 1)
    same.unlabeled.erased = [NOTHING] * 3
    state = copy.deepcopy(model.state_dict())
    expected = model(plain)
    model.load_state_dict(state)
    found = model(same)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, msg=name)


@pytest.mark.parametrize("views", ["both", "strong", "weak"])
def test_targets_of_each_view_of_labeled_images(views):
    labeled = make_batch().labeled
    others = [
        Targets.from_ground_truth(BOXES[:count], torch.ones(count, dtype=torch.int64), NUM_CLASSES)
        for count in (3, 0)
    ]
    labeled.strong_targets = others
    batch = replace(make_batch(), labeled=labeled, unlabeled=None)
    model = _model(labeled_views=views, burn_in_iters=5)
    images, targets = {
        "both": (labeled.strong + labeled.weak, others + labeled.targets),
        "strong": (labeled.strong, others),
        "weak": (labeled.weak, labeled.targets),
    }[views]
    expected = _losses(model.student, images, targets)
    found = model(batch)
    assert found.keys() == LOSS_NAMES
    for name, loss in found.items():
        assert torch.equal(loss, expected[name]), name


def test_parts_of_a_batch_have_their_part_of_the_geometry():
    views = _own_geometry(make_batch()).unlabeled
    parts = views.split(3)
    assert all(isinstance(part, Views) for part in parts)
    for row, part in enumerate(parts):
        assert torch.equal(part.to_strong, views.to_strong[row : row + 1])
        assert part.erased == [views.erased[row]]
    moved = views.to("cpu", torch.float64)
    assert moved.to_strong.dtype == torch.float64 and moved.erased[2].shape == (1, 4)


METHODS = {
    "LABEL_MATCH": lambda _: LabelMatch(),
    "CONTRASTIVE": lambda student: ClassAwareContrast(student),
    "DASO": lambda student: DASO(student, delay=0, pool_floor=0.0),
}


class AskedDetector(FakeDetector):
    """Notes the boxes of regions that are scored."""

    def score_regions(self, features, boxes, stride_shift=0):
        self.asked = boxes
        return super().score_regions(features, boxes, stride_shift)


@pytest.mark.parametrize("name", ["LABEL_MATCH", "CONTRASTIVE", "DASO"])
def test_methods_ask_the_teacher_where_boxes_are_in_the_weak_views(name):
    """Strong views show the left upper quarter of the weak ones, enlarged."""
    torch.manual_seed(0)
    student = AskedDetector()
    method = METHODS[name](student)
    model = TeacherStudent(
        student,
        FixedThreshold(1.0, undecided_thresh=0.0) if method.undecided else FixedThreshold(0.0),
        burn_in_iters=0,
        ema_decay=0.75,
        unsup_loss_weight=1.0,
        methods={name: method, "LOOKER": (looker := Looker())},
    )
    train(training_step(model), 2)
    batch = make_batch(2)
    double = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    batch.unlabeled.to_strong = double.repeat(3, 1, 1)
    batch.unlabeled.erased = [NOTHING] * 3
    model(batch)
    asked, step = model.teacher.asked, looker.step
    assert len(asked) == 3 and sum(map(len, asked)) > 0
    for row, boxes in enumerate(asked):
        if name == "LABEL_MATCH":  # the student's regions, which are those of its strong view
            known = BOXES / 2
        else:
            known = step.pseudo_labels[row].found
            assert {tuple(b) for b in known.tolist()} <= {tuple(b) for b in BOXES.tolist()}
        assert {tuple(b) for b in boxes.tolist()} <= {tuple(b) for b in known.tolist()}
