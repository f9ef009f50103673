import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ssod.core.filters import FixedThreshold
from ssod.core.structures import Detections
from ssod.errors import InputError

NUM_CLASSES = 3
WAITING = {"tolist", "item", "numpy", "cpu", "nonzero", "masked_select", "bincount", "unique"}
WAITING |= {"equal", "allclose", "__bool__", "__int__", "__float__", "__index__", "__contains__"}


def make_detections(scores, classes, num_classes=NUM_CLASSES, dtype=torch.float32):
    """Detections, best first, whose region has the rest of the probability anywhere else."""
    scores = torch.as_tensor(scores, dtype=dtype)
    classes = torch.as_tensor(classes, dtype=torch.int64)
    rest = torch.rand(len(scores), num_classes + 1, dtype=torch.float64) + 0.01
    rest[torch.arange(len(scores)), classes] = 0
    probs = rest / rest.sum(1, keepdim=True) * (1 - scores.double())[:, None]
    probs[torch.arange(len(scores)), classes] = scores.double()
    boxes = torch.rand(len(scores), 4)
    return Detections(boxes, scores, classes, probs.to(dtype), torch.rand(len(scores), 2))


def random_images(generator, sizes, num_classes=NUM_CLASSES, low=0.0, dtype=torch.float32):
    """Images with so many detections, of random classes and scores above `low`."""
    images = []
    for size in sizes:
        scores = low + (1 - low) * torch.rand(size, generator=generator, dtype=torch.float64)
        classes = torch.randint(num_classes, (size,), generator=generator)
        scores = scores.sort(descending=True).values
        images.append(make_detections(scores, classes, num_classes, dtype))
    return images


class HostReads(TorchFunctionMode):
    """Counts calls for which the host waits for the device, if there is one."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        indices = args[1:2] if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        self.count += func.__name__ in WAITING or by_mask
        return func(*args, **(kwargs or {}))


def _detections(scores):
    """Detections of the given scores, every row different from the others."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    count = len(scores)
    return Detections(
        boxes=torch.rand(count, 4),
        scores=scores,
        classes=torch.arange(count) % NUM_CLASSES,
        class_probs=torch.rand(count, NUM_CLASSES + 1).softmax(1),
        embeddings=torch.rand(count, 2),
    )


def _kept_scores(scores, score_thresh):
    (labels,) = FixedThreshold(score_thresh)([_detections(scores)])
    return labels.scores.tolist()


def test_values_by_hand():
    first, second = FixedThreshold(0.5)([_detections([0.75, 0.625, 0.25]), _detections([0.125])])
    assert first.scores.tolist() == [0.75, 0.625]
    assert first.classes.tolist() == [0, 1]
    assert first.weights.tolist() == first.box_weights.tolist() == [1.0, 1.0]
    assert first.reliable.tolist() == [True, True]
    assert len(second) == 0
    assert second.class_probs.shape == (0, NUM_CLASSES + 1)
    assert second.reliable.dtype == torch.bool


@pytest.mark.parametrize("score_thresh", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("sizes", [[0], [1], [0, 7, 2], [100]])
def test_matches_selection_one_by_one(sizes, score_thresh):
    torch.manual_seed(0)
    images = [_detections(torch.rand(size).sort(descending=True).values) for size in sizes]
    labels = FixedThreshold(score_thresh)(images)
    assert len(labels) == len(images)
    for image, kept in zip(images, labels, strict=True):
        rows = [r for r in range(len(image)) if float(image.scores[r]) > score_thresh]
        assert len(kept) == len(rows)
        for name in ("boxes", "scores", "classes", "class_probs"):
            assert getattr(kept, name).tolist() == [getattr(image, name)[r].tolist() for r in rows]


@pytest.mark.parametrize("score_thresh", [0.5, 0.7])
def test_a_score_at_the_threshold_is_not_kept(score_thresh):
    at = torch.tensor(score_thresh)
    above = torch.nextafter(at, torch.tensor(1.0))
    assert _kept_scores(torch.stack([above, at]), score_thresh) == [float(above)]


def test_threshold_zero_keeps_all_but_zero_scores():
    assert _kept_scores([1.0, 2**-100, 0.0], 0.0) == [1.0, 2**-100]


def test_threshold_one_keeps_nothing():
    assert _kept_scores([1.0, 0.5], 1.0) == []


@pytest.mark.parametrize("nan_first", [True, False])  # `sort(descending=True)` puts NaN first
def test_a_nan_score_is_never_kept(nan_first):
    scores = [float("nan"), 0.75] if nan_first else [0.75, float("nan")]
    assert _kept_scores(scores, 0.5) == [0.75]


def test_input_is_not_changed():
    detections = _detections([0.75, 0.25])
    before = copy.deepcopy(detections)
    FixedThreshold(0.5)([detections])
    for name, tensor in vars(before).items():
        assert torch.equal(getattr(detections, name), tensor)


def test_state_is_empty_and_mode_makes_no_difference():
    images = [_detections([0.75, 0.25])]
    labels = FixedThreshold(0.5)
    assert labels.state_dict() == {}
    assert torch.equal(labels.train()(images)[0].boxes, labels.eval()(images)[0].boxes)


@pytest.mark.parametrize("score_thresh", [-0.1, 1.1, float("nan")])
def test_threshold_that_is_no_probability_is_refused(score_thresh):
    with pytest.raises(ValueError, match=rf"SCORE_THRESH must be in \[0, 1\], got {score_thresh}"):
        FixedThreshold(score_thresh)


def test_boxes_between_two_thresholds_are_kept_with_no_weight():
    scores = [0.9, 0.7, 0.6, 0.5, 0.3]
    (both,) = FixedThreshold(0.7, 0.5)([_detections(scores)])
    assert both.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert both.reliable.tolist() == [True, False, False]
    assert both.weights.tolist() == both.box_weights.tolist() == [1.0, 0.0, 0.0]
    assert FixedThreshold(0.7, 0.5).drops_undecided
    for labels in (FixedThreshold(0.7), FixedThreshold(0.7, 0.7)):
        assert len(labels([_detections(scores)])[0]) == 1
        assert not labels.drops_undecided


@pytest.mark.parametrize("low", [-0.1, 0.71, float("nan")])
def test_a_lower_threshold_above_the_other_is_refused(low):
    message = rf"undecided_thresh must be in \[0, score_thresh 0.7\], got {low}"
    with pytest.raises(InputError, match=message):
        FixedThreshold(0.7, low)


def test_a_fixed_threshold_has_nothing_to_learn_or_report():
    labels = FixedThreshold()
    labels.set_label_distribution(torch.ones(NUM_CLASSES), num_labeled=1)
    assert labels.state_dict() == {} and labels.metrics() == {}


def test_waiting_for_the_device_is_noticed():
    values = torch.tensor([1.0, 2.0])
    with HostReads() as reads:
        assert values[0] > 0
        assert float(values.sum()) == sum(values.tolist())
        assert values[values > 0].nonzero().shape == (2, 1)
    assert reads.count == 5


def test_the_host_is_asked_once_a_batch():
    images = [_detections([0.75, 0.25]), _detections([]), _detections([0.9])]
    with HostReads() as reads:
        FixedThreshold(0.5)(images)
    assert reads.count == 1
