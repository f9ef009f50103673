import copy
import io
import math
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from test_filters import HostReads, make_detections, random_images

from ssod.core.gaussian_mixture import GaussianMixtureThreshold, mixture_thresholds
from ssod.errors import InputError

NUM_CLASSES, LENGTH = 3, 12
FALLBACK = 0.7
DRAWS = {
    "uniform": lambda rng, n: rng.uniform(0.05, 1, n),
    "two groups": lambda rng, n: np.concatenate(
        [rng.beta(2, 12, n - n // 3), rng.beta(12, 2, n // 3)]
    ),
    "mostly wrong": lambda rng, n: 0.05 + 0.95 * rng.beta(1, 8, n),
    "mostly right": lambda rng, n: rng.beta(6, 2, n),
    # Some need more than 50 iterations.
    "hardly two groups": lambda rng, n: np.concatenate(
        [rng.beta(0.594, 2.573, n - 9 * n // 20), rng.beta(1.404, 5.136, 9 * n // 20)]
    ).clip(0.05),
    "few values": lambda rng, n: rng.choice([0.1, 0.3, 0.35, 0.9], n),
}


def _reference(scores, fallback=FALLBACK):
    """Return the threshold of one class, fitted by scikit-learn."""
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) < 4:
        return fallback
    rows = scores[:, None]
    mixture = GaussianMixture(
        2,
        weights_init=[0.5, 0.5],
        means_init=[[scores.min()], [scores.max()]],
        precisions_init=[[[1.0]], [[1.0]]],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(rows)
    likelihood = np.where(mixture.predict(rows) == 1, mixture.score_samples(rows), -np.inf)
    return fallback if np.isneginf(likelihood).all() else scores[likelihood.argmax()]


def _padded(rows, length=100):
    table = torch.zeros(len(rows), length)
    for places, row in zip(table, rows, strict=True):
        places[: len(row)] = torch.as_tensor(row)
    return table


def _looked_at(image):
    """Return scores and classes of an image's best detections, from Python floats."""
    pairs = [(s, c) for s, c in zip(image.scores.tolist(), image.classes.tolist(), strict=True)]
    pairs = [(0.0 if math.isnan(s) else s, c) for s, c in pairs]
    number = int(sum(s for s, _ in pairs) + 0.5) + 1
    best = sorted(pairs, key=lambda pair: -pair[0])[:number]
    return [(s, c) for s, c in best if s > 0]


class _Reference:
    """The filter on lists: a deque of each class, and scikit-learn."""

    def __init__(self, length=LENGTH):
        self.queues = [deque(maxlen=length) for _ in range(NUM_CLASSES)]

    def __call__(self, images):
        for image in images:
            for score, c in _looked_at(image):
                self.queues[c].append(score)
        thresholds = self.thresholds()
        return [[(s, c) for s, c in _looked_at(i) if s > thresholds[c]] for i in images]

    def thresholds(self):
        return [_reference(queue) for queue in self.queues]


def _filter(**kwargs):
    return GaussianMixtureThreshold(NUM_CLASSES, **{"num_scores": LENGTH, **kwargs})


def _batches(count, sizes=(7, 0, 4), **kwargs):
    generator = torch.Generator().manual_seed(0)
    return [random_images(generator, sizes, **kwargs) for _ in range(count)]


def _state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("draw", DRAWS)
def test_thresholds_are_those_of_scikit_learn(draw):
    rng = np.random.default_rng(0)
    rows = [DRAWS[draw](rng, n).astype(np.float32) for n in rng.integers(0, 101, 40)]
    expected = [_reference(row) for row in rows]
    actual = mixture_thresholds(_padded(rows), FALLBACK)
    assert len(set(expected)) > 3
    assert actual.tolist() == pytest.approx(expected, abs=1e-7)


def test_the_order_of_scores_and_where_places_are_empty_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 50, generator=generator) * (torch.rand(5, 50) > 0.3)
    expected = mixture_thresholds(scores, FALLBACK)
    shuffled = torch.stack([row[torch.randperm(50, generator=generator)] for row in scores])
    assert torch.equal(mixture_thresholds(shuffled, FALLBACK), expected)


def test_two_clear_groups_are_told_apart():
    low, high = torch.linspace(0.05, 0.15, 60), torch.linspace(0.8, 0.9, 21)
    (threshold,) = mixture_thresholds(torch.cat([low, high])[None], FALLBACK)
    assert threshold == pytest.approx(0.85, abs=1e-6)  # the middle of the better one


@pytest.mark.parametrize("scores", [[], [0.9], [0.9, 0.2, 0.1], [0.4] * 10])
def test_a_class_with_few_scores_or_equal_ones_has_the_fixed_threshold(scores):
    rows = [scores, [0.1, 0.12, 0.8, 0.82, 0.84]]
    few, other = mixture_thresholds(_padded(rows), FALLBACK).tolist()
    assert few == pytest.approx(FALLBACK) and other == pytest.approx(_reference(rows[1]), abs=1e-7)
    assert other != pytest.approx(FALLBACK)


@pytest.mark.parametrize("sizes", [(7, 0, 4), (1,), (40, 35)])
def test_filter_equals_the_reference(sizes):
    labels, reference = _filter(), _Reference()
    for images in _batches(12, sizes):
        kept, expected = labels(images), reference(images)
        for row, queue in zip(labels.scores, reference.queues, strict=True):
            # The oldest first, behind the empty places.
            assert row.tolist() == [0.0] * (LENGTH - len(queue)) + list(queue)
        assert labels.thresholds.tolist() == pytest.approx(reference.thresholds(), abs=1e-7)
        pairs = [list(zip(k.scores.tolist(), k.classes.tolist(), strict=True)) for k in kept]
        assert pairs == expected
        for k in kept:
            assert k.reliable.all() and (k.weights == 1).all() and (k.box_weights == 1).all()
    assert float(labels.metrics()["pseudo/reliable_thresh"]) == pytest.approx(
        sum(reference.thresholds()) / NUM_CLASSES
    )


def test_more_boxes_than_scores_add_up_to_are_neither_learned_nor_remembered():
    labels = _filter(score_thresh=0.1)
    # 0.9 + 0.3 + 0.2 + 0.15 is 1.55, so two and one more.
    (kept,) = labels([make_detections([0.2, 0.9, 0.15, 0.3], [0, 1, 1, 1])])
    assert sorted(kept.scores.tolist()) == pytest.approx([0.2, 0.3, 0.9])
    assert labels.scores[1].tolist()[-2:] == pytest.approx([0.9, 0.3])
    # The first is looked at however low its score.
    (kept,) = labels([make_detections([0.2, 0.15], [2, 2])])
    assert kept.scores.tolist() == pytest.approx([0.2])


def test_a_score_at_the_fixed_threshold_is_not_kept():
    (kept,) = _filter(score_thresh=0.75)([make_detections([0.8, 0.75], [0, 1])])
    assert kept.scores.tolist() == pytest.approx([0.8])


def test_of_many_detections_of_an_image_the_best_are_remembered():
    labels = _filter(max_detections=2)
    labels([make_detections([0.9, 0.95, 0.85], [0, 0, 0])])
    assert labels.scores[0].tolist()[-3:] == pytest.approx([0.0, 0.95, 0.9])


def test_a_class_that_is_not_found_keeps_its_scores_and_threshold():
    labels = _filter()
    labels([make_detections([0.95, 0.94, 0.9, 0.3, 0.2, 0.1], [0] * 6)])
    scores, threshold = labels.scores[0].clone(), labels.thresholds[0].clone()
    assert threshold > 0.8
    labels([make_detections([0.5, 0.4], [1, 1])])
    assert torch.equal(labels.scores[0], scores) and labels.thresholds[0] == threshold
    before = _state(labels)
    labels([make_detections([], [])])
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(labels).items())


@pytest.mark.parametrize("saved_at", [1, 2, 5])
def test_resumed_run_equals_an_uninterrupted_one(saved_at):
    batches = _batches(9)
    whole = _filter()
    for batch in batches[:saved_at]:
        whole(batch)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = _filter()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.thresholds, whole.thresholds)
    for batch in batches[saved_at:]:
        for a, b in zip(whole(batch), resumed(batch), strict=True):
            assert torch.equal(a.scores, b.scores)
        other = resumed.state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in _state(whole).items())


def test_eval_mode_changes_nothing_and_uses_the_thresholds():
    labels, reference = _filter(), _Reference()
    first, second = _batches(2)
    labels(first)
    reference(first)
    before = _state(labels)
    kept = labels.eval()(second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(labels).items())
    thresholds = reference.thresholds()
    expected = [[s for s, c in _looked_at(image) if s > thresholds[c]] for image in second]
    assert [k.scores.tolist() for k in kept] == expected
    assert sum(map(len, expected)) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_input_does_not_change_the_state(dtype):
    labels = _filter()
    before = {name: tensor.dtype for name, tensor in labels.state_dict().items()}
    for batch in _batches(3, dtype=dtype):
        kept = labels(batch)
        assert all(k.weights.dtype == dtype for k in kept)
    assert {name: tensor.dtype for name, tensor in labels.state_dict().items()} == before


def test_input_is_not_changed():
    batch = _batches(1)[0]
    before = copy.deepcopy(batch)
    _filter()(batch)
    for image, copied in zip(batch, before, strict=True):
        assert all(torch.equal(getattr(image, n), t) for n, t in vars(copied).items())


def test_nan_is_neither_kept_nor_remembered():
    bad, clean = (make_detections([0.9, 0.8, 0.3], [0, 1, 0]) for _ in range(2))
    bad.scores[0] = math.nan
    labels = _filter(score_thresh=0.1)
    (kept,) = labels([bad])
    assert kept.scores.tolist() == pytest.approx([0.8, 0.3])
    assert labels.scores.isfinite().all() and labels.thresholds.isfinite().all()
    assert (labels.scores > 0).sum(1).tolist() == [1, 1, 0]
    labels([clean])
    assert (labels.scores > 0).sum(1).tolist() == [3, 2, 0]


def test_the_host_is_asked_once_a_batch():
    labels = _filter()
    first, second = _batches(2)
    labels(first)
    with HostReads() as reads:
        labels(second)
        labels.metrics()
    assert reads.count == 1


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("score_thresh", 1.5, r"^SSOD.FILTER.SCORE_THRESH must be in \[0, 1\], got 1.5.*$"),
        ("score_thresh", math.nan, r"SSOD.FILTER.SCORE_THRESH must be in \[0, 1\], got nan"),
        ("num_scores", 0, "num_scores must be at least 1, got 0"),
        ("max_detections", -1, "TEST.DETECTIONS_PER_IMAGE must be at least 1, got -1"),
    ],
)
def test_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        GaussianMixtureThreshold(NUM_CLASSES, **{argument: value})
