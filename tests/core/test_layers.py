"""Methods that ask the teacher about a region find it, whatever strong views show."""

from dataclasses import replace

import pytest
import torch
from fake_detector import BOXES, NUM_CLASSES, FakeDetector
from fake_training import make_batch, make_images

from ssod.core.contrastive import ClassAwareContrast
from ssod.core.daso import DASO
from ssod.core.filters import FixedThreshold
from ssod.core.geometry import view_matrix
from ssod.core.label_match import LabelMatch
from ssod.core.low_resolution import LowResolutionBranch
from ssod.core.method import Method, Step, choose_layer, score_shown
from ssod.core.structures import Layer, PseudoLabels, Views
from ssod.core.teacher_student import TeacherStudent

METHODS = {
    "LabelMatch": lambda student: LabelMatch(),
    "LabelMatch, teacher": lambda student: LabelMatch(mining="teacher"),
    "DASO": lambda student: DASO(student, delay=0, pool_floor=0.0, window=1),
    "CCSSL": lambda student: ClassAwareContrast(student, ramp_iters=0, push_thresh=0.0),
    "CCSSL, student": lambda student: ClassAwareContrast(
        student, ramp_iters=0, push_thresh=0.0, views="student"
    ),
    "LSM": LowResolutionBranch,
}


class Rolled(Method):
    """Strong view i shows the weak view i + 1, with its boxes."""

    def mix(self, views, pseudo_labels):
        images = [*range(1, len(views)), 0]
        strong = [views.strong[image] for image in images]
        views = replace(views, strong=strong, mixed=[Layer(images)])
        return views, [pseudo_labels[image] for image in images]


class Stacked(Rolled):
    """The same in a second layer, below which the first shows the image itself, without boxes."""

    def mix(self, views, pseudo_labels):
        first = views.layers
        views, pseudo_labels = super().mix(views, pseudo_labels)
        views = replace(views, mixed=first + views.layers)
        return views, [replace(p, layer=torch.ones_like(p.layer)) for p in pseudo_labels]


def _losses(name, *methods):
    torch.manual_seed(0)
    student = FakeDetector()
    named = dict(zip("ab", [*methods, METHODS[name](student)], strict=False))
    model = TeacherStudent(
        student,
        FixedThreshold(0.9, 0.0),
        burn_in_iters=0,
        ema_decay=0.5,
        unsup_loss_weight=1.0,
        unsup_box_losses=True,
        methods=named,
    )
    model.start_teacher_if_due()
    for seed in range(3):
        batch = make_batch()
        generator = torch.Generator().manual_seed(seed)
        strong = make_images(generator, 3)
        batch.unlabeled = replace(
            batch.unlabeled, strong=strong, second_strong=make_images(generator, 3)
        )
        torch.manual_seed(seed)
        losses = model(batch)
        model.after_step()
    return losses


@pytest.mark.parametrize("mixed", [Rolled, Stacked])
@pytest.mark.parametrize("name", METHODS)
def test_losses_do_not_depend_on_which_strong_view_shows_what(name, mixed):
    plain, other = _losses(name), _losses(name, mixed())
    assert set(plain) == set(other) and len(plain) > 8
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, msg=key)


def test_boxes_of_strong_views_are_found_in_the_weak_ones():
    images = [torch.zeros(3, 40, 60), torch.zeros(3, 30, 20)]
    step = Step(None, None, 0, None, unlabeled=Views(images, [], None, [0, 1]))
    matrices = torch.stack([view_matrix(2.0, 3.0), view_matrix(0.5, 0.5, flip_width=30.0)])
    boxes = [torch.tensor([[2.0, 3.0, 20.0, 33.0]]), torch.tensor([[5.0, 1.0, 10.0, 4.0]])]
    first, second = step.weak_boxes(Layer([1, 0], matrices), boxes)
    assert first.tolist() == [[1.0, 1.0, 10.0, 11.0]]
    assert second.tolist() == [[40.0, 2.0, 50.0, 8.0]]
    clipped = step.weak_boxes(Layer([1], matrices[:1]), [torch.tensor([[-9.0, 0.0, 99.0, 99.0]])])
    assert clipped[0].tolist() == [[0.0, 0.0, 20.0, 30.0]]
    assert step.weak_boxes(Layer([0, 1]), boxes) is boxes


@pytest.mark.parametrize("images", [[0, 1, 2], [2, 0, 1], [1, 1], [2]])
def test_regions_are_scored_in_the_image_that_is_shown(images):
    torch.manual_seed(0)
    detector = FakeDetector().eval()
    features = detector.features(
        detector.preprocess(make_images(torch.Generator().manual_seed(0), 3))
    )
    boxes = [BOXES[: 1 + row] for row in range(len(images))]
    found = score_shown(detector, features, 3, Layer(images), boxes)
    rows = []
    for image, b in zip(images, boxes, strict=True):
        own = {name: level[image : image + 1] for name, level in features.items()}
        rows.append(detector.score_regions(own, [b]).logits)
    expected = torch.cat([torch.zeros(0, NUM_CLASSES + 1), *rows])
    torch.testing.assert_close(found.logits, expected)


def test_each_row_has_the_values_of_its_layer():
    values = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0], [6.0]])]
    assert choose_layer(values, torch.tensor([0, 1, 0])).tolist() == [[1.0], [5.0], [3.0]]
    assert choose_layer(values[:1], torch.tensor([0, 0, 0])) is values[0]


def test_pseudo_labels_were_found_where_they_are_unless_it_is_said():
    rows, probs = torch.zeros(1), torch.zeros(1, NUM_CLASSES + 1)
    labels = PseudoLabels(BOXES[:1], rows.long(), rows, rows, rows, probs, rows > 0)
    assert labels.found is labels.boxes
    assert labels.layer.tolist() == [0]
