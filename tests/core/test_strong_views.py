"""Strong views without a pseudo-box: three ways, each against losses that are taken by hand."""

import copy

import pytest
import torch
from fake_detector import LOSS_NAMES, NUM_CLASSES, FakeDetector
from fake_training import make_batch

from ssod.core.filters import PseudoLabelFilter
from ssod.core.method import Method
from ssod.core.mixing import MixPL
from ssod.core.structures import PseudoLabels
from ssod.core.teacher_student import TeacherStudent

UNSUP = {f"{name}_unsup" for name in LOSS_NAMES}


class Given(PseudoLabelFilter):
    """So many boxes in each image, the first of which is undecided."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def forward(self, detections):
        boxes = torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 0.0, 4.0, 2.0]])
        reliable, weights = torch.tensor([False, True]), torch.tensor([0.0, 1.0])
        probs = torch.full((2, NUM_CLASSES + 1), 1 / 3)
        classes = torch.tensor([0, 1])
        labels = PseudoLabels(boxes, classes, weights, weights, weights, probs, reliable)
        return [labels[:count] for count in self.counts]


class Seeing(Method):
    """Notes the record."""

    group = "SEEING"

    def losses(self, step):
        self.step = step
        return {"loss_seen": step.main.regions.logits.square().mean()}


def _model(counts, empty_images, **methods):
    torch.manual_seed(0)
    model = TeacherStudent(
        FakeDetector(),
        Given(counts),
        burn_in_iters=0,
        ema_decay=0.75,
        unsup_loss_weight=3.0,
        unsup_box_losses=True,
        empty_images=empty_images,
        methods=methods,
    )
    assert model.start_teacher_if_due()
    return model


def _by_hand(model, batch, rows):
    """Losses of some strong views alone."""
    student = copy.deepcopy(model.student)
    labels = model.pseudo_labels(batch.unlabeled.weak)
    images = student.preprocess([batch.unlabeled.strong[row] for row in rows])
    targets = [labels[row].to_targets() for row in rows]
    return student.losses(student.features(images), images, targets).losses


@pytest.mark.parametrize(
    ("counts", "kept"), [((2, 0, 1), [0, 2]), ((0, 0, 2), [2]), ((1, 2, 1), [0, 1, 2])]
)
def test_the_three_ways(counts, kept):
    expected = {
        "background": (range(3), 1.0),
        "left_out": (kept, 1.0),
        "share": (range(3), len(kept) / 3),
    }
    batch, found = make_batch(), []
    for empty_images, (rows, factor) in expected.items():
        model = _model(counts, empty_images)
        by_hand = _by_hand(model, batch, rows)
        losses = model(batch)
        for name in LOSS_NAMES:
            torch.testing.assert_close(losses[f"{name}_unsup"], 3 * factor * by_hand[name])
        assert float(model.metrics["pseudo/empty_images"]) == pytest.approx(1 - len(kept) / 3)
        # Boxes are counted over all images, whatever is left out.
        boxes = sum(count == 2 for count in counts) / 3
        assert float(model.metrics["pseudo/num_per_image"]) == pytest.approx(boxes)
        found.append(losses["loss_cls_unsup"].item())
    assert len(set(found)) == (1 if len(kept) == 3 else 3)


@pytest.mark.parametrize(("drops", "empty"), [(True, 2 / 3), (False, 0.0)])
def test_an_image_of_undecided_boxes_is_empty_if_these_are_background(drops, empty):
    model = _model((1, 2, 1), "share")
    model.pseudo_label_filter.drops_undecided = drops
    losses = model(make_batch())
    assert float(model.metrics["pseudo/empty_images"]) == pytest.approx(empty)
    model.empty_images = "background"
    plain = model(make_batch())["loss_rpn_cls_unsup"]
    torch.testing.assert_close(losses["loss_rpn_cls_unsup"], (1 - empty) * plain)


@pytest.mark.parametrize("empty_images", ["left_out", "share"])
def test_without_a_single_box_all_losses_are_zeros_with_a_graph(empty_images):
    model = _model((0, 0, 0), empty_images, SEEING=Seeing())
    losses = model(make_batch())
    unsup = {name: loss for name, loss in losses.items() if name.endswith("_unsup")}
    assert unsup.keys() == UNSUP | {"loss_seen_unsup"}
    assert all(loss == 0 and loss.requires_grad for loss in unsup.values())
    sum(unsup.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.student.parameters())
    assert model.metrics["pseudo/empty_images"] == 1
    assert _model((0, 0, 0), "background")(make_batch())["loss_cls_unsup"] > 0


@pytest.mark.parametrize("empty_images", ["left_out", "share"])
def test_methods_are_treated_alike(empty_images):
    method = Seeing()
    model, batch = _model((2, 0, 1), empty_images, SEEING=method), make_batch()
    losses = model(batch)
    step = method.step
    expected = step.main.regions.logits.square().mean()
    factor = 1 if empty_images == "left_out" else 2 / 3
    torch.testing.assert_close(losses["loss_seen_unsup"], 3 * factor * expected)
    rows = [0, 2] if empty_images == "left_out" else [0, 1, 2]
    assert step.unlabeled.layers[0].images == rows
    assert [len(label) for label in step.pseudo_labels] == [(2, 0, 1)[row] for row in rows]
    assert len(step.batch) == len(step.learned) == len(rows)
    # The weak views stay, and what the teacher says of a region is of the right one.
    assert len(step.unlabeled.weak) == len(step.teacher_features["0"]) == 3
    (layer,) = step.unlabeled.layers
    boxes = [label.boxes for label in step.pseudo_labels]
    asked = step.ask_teacher(layer, boxes).embeddings
    by_hand = model.teacher.score_regions({"0": step.teacher_features["0"][rows]}, boxes).embeddings
    torch.testing.assert_close(asked, by_hand)


def test_a_mixed_view_is_empty_if_both_images_are():
    mixing = MixPL(FakeDetector(), mosaic_weight=0.0, unlabeled_per_pass=3)
    seen = Seeing()
    batch = make_batch()
    model = _model((0, 0, 2), "left_out", MIXPL=mixing, SEEING=seen)
    model(batch)
    # Views 0 (with 2), 1 (with 0) and 2 (with 1).
    assert [layer.images for layer in seen.step.unlabeled.layers] == [[0, 2], [2, 1]]
    assert [layer.matrices.shape for layer in seen.step.unlabeled.layers] == [(2, 3, 3)] * 2
    assert [label.layer.tolist() for label in seen.step.pseudo_labels] == [[1, 1], [0, 0]]
    assert float(model.metrics["pseudo/empty_images"]) == pytest.approx(1 / 3)
    assert float(model.metrics["pseudo/num_per_image"]) == pytest.approx(1 / 3)
    one = _model((0, 1, 2), "left_out", MIXPL=mixing, SEEING=seen)
    one(batch)
    assert one.metrics["pseudo/empty_images"] == 0
