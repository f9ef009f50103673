import copy
import io
import json
import math
from pathlib import Path

import pytest
import torch
from test_filters import HostReads, make_detections, random_images

from ssod.core.adaptive_threshold import AdaptiveClassThreshold, class_thresholds
from ssod.core.structures import RegionSamples
from ssod.errors import InputError
from ssod.hosts.torchvision.defaults import get_config

CASES = json.loads((Path(__file__).parent / "data" / "worked_cases.json").read_text())
NUM_CLASSES = 3
COUNTS, NUM_LABELED = torch.tensor([6, 3, 0]), 4


def _reference(scores, labels, class_counts, num_labeled, num_unlabeled, fraction, min_score):
    """Return both thresholds of each class, from sorted lists of Python floats."""
    thresholds = []
    for c, count in enumerate(class_counts.tolist()):
        own = sorted(scores[labels == c].tolist(), reverse=True)
        expected = max(count, 1) * num_unlabeled // num_labeled
        for rank in (math.floor(fraction * expected + 1e-9), expected):
            rank = min(max(rank, 1), len(own))
            thresholds.append(max(own[rank - 1], min_score) if own else min_score)
    return thresholds[::2], thresholds[1::2]


def _filter(**kwargs):
    arguments = {"queue_images": 6, "refresh_period": 3, "max_detections": 8, **kwargs}
    labels = AdaptiveClassThreshold(NUM_CLASSES, **arguments)
    labels.set_label_distribution(COUNTS, NUM_LABELED)
    return labels


def _batches(count, sizes=(5, 0, 3), **kwargs):
    generator = torch.Generator().manual_seed(0)
    return [random_images(generator, sizes, **kwargs) for _ in range(count)]


def _flat(images, field):
    return torch.cat([getattr(image, field) for image in images])


def _state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_worked_case_of_ranks_and_too_few_detections():
    case = CASES["L1_act"]
    scores, inputs, outputs = case["inputs"]["scores"], case["inputs"], case["outputs"]
    flat = torch.tensor([s for own in scores for s in own], dtype=torch.float64)
    labels = torch.tensor([c for c, own in enumerate(scores) for _ in own])
    counts = torch.tensor(inputs["n_l"])
    reliable, uncertain = class_thresholds(
        flat, labels, counts, inputs["N_l"], inputs["N_u"], reliable_fraction=0.5
    )
    assert uncertain.tolist() == outputs["thr_rank"]
    assert reliable.tolist() == outputs["thr_reliable_alpha0.5_rank"]
    kept = [int((flat[labels == c] >= uncertain[c]).sum()) for c in range(4)]
    assert kept == outputs["kept_rank"]


@pytest.mark.parametrize("example", CASES["L3_float_rank"]["outputs"]["examples"])
def test_worked_case_of_ranks_that_floats_miss(example):
    count, _, num_labeled, num_unlabeled, in_floats, exact = example
    scores = torch.linspace(0.1, 1, exact + 10, dtype=torch.float64)
    labels = torch.zeros(len(scores), dtype=torch.int64)
    counts = torch.tensor([count])
    _, uncertain = class_thresholds(scores, labels, counts, num_labeled, num_unlabeled)
    assert int((scores >= uncertain).sum()) == exact == in_floats + 1


def test_the_reliable_rank_is_exact_where_floats_are_not():
    assert 0.29 * 100 < 29
    scores, labels = torch.linspace(0.1, 1, 200), torch.zeros(200, dtype=torch.int64)
    reliable, _ = class_thresholds(scores, labels, torch.tensor([100]), 1, 1, 0.29)
    assert int((scores >= reliable).sum()) == 29


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [1, 4, 20])
@pytest.mark.parametrize("size", [0, 1, 7, 300])
@pytest.mark.parametrize("digits", [1, 9], ids=["ties", "distinct"])
def test_matches_loop_reference(size, num_classes, dtype, digits):
    torch.manual_seed(size + num_classes)
    scores = (torch.rand(size, dtype=torch.float64) * 10**digits).round() / 10**digits
    labels = torch.randint(num_classes + 1, (size,))  # with background
    counts = torch.randint(30, (num_classes,))
    for num_labeled, num_unlabeled, fraction in [(10, 10, 0.2), (7, 40, 0.5), (9, 2, 1.0)]:
        arguments = (counts, num_labeled, num_unlabeled, fraction, 0.15)
        found = class_thresholds(scores.to(dtype), labels, *arguments)
        expected = _reference(scores, labels, *arguments)
        for actual, values in zip(found, expected, strict=True):
            assert actual.dtype == dtype
            assert torch.equal(actual, torch.tensor(values, dtype=torch.float64).to(dtype))
        assert (found[0] >= found[1]).all()


def test_order_does_not_matter_and_nothing_given_is_changed():
    torch.manual_seed(0)
    scores, labels, counts = torch.rand(50), torch.randint(4, (50,)), torch.tensor([9, 5, 1])
    before = [scores.clone(), labels.clone(), counts.clone()]
    first = class_thresholds(scores, labels, counts, 3, 4)
    order = torch.randperm(50)
    second = class_thresholds(scores[order], labels[order], counts, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([scores, labels, counts], before, strict=True))


def test_one_class_gives_the_global_threshold():
    scores = torch.rand(40)
    labels = torch.zeros(40, dtype=torch.int64)
    _, uncertain = class_thresholds(scores, labels, torch.tensor([12]), 1, 1)
    assert float(uncertain) == float(scores.sort(descending=True).values[11])


def test_all_reliable_gives_one_threshold():
    images = _batches(1, sizes=(50,))[0]
    arguments = (images[0].scores, images[0].classes, COUNTS, NUM_LABELED, 9)
    reliable, uncertain = class_thresholds(*arguments, reliable_fraction=1.0)
    assert torch.equal(reliable, uncertain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.tensor([0.5, math.nan])}, "got 1 NaN among 2"),
        ({"labels": torch.tensor([0, 4])}, r"labels must be in \[0, 3\], got 1 others among 2"),
        ({"labels": torch.tensor([-1, 0])}, r"labels must be in \[0, 3\], got 1 others among 2"),
        ({"labels": torch.tensor([0])}, r"of one shape \(R,\), got \(2,\) and \(1,\)"),
        ({"num_labeled": 0}, "num_labeled must be at least 1 .* got 0 and 5"),
        ({"num_unlabeled": -1}, "num_unlabeled at least 0, got 4 and -1"),
        ({"reliable_fraction": 1.1}, r"reliable_fraction must be in \[0, 1\], got 1.1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change, message):
    arguments = {"scores": torch.tensor([0.5, 0.4]), "labels": torch.tensor([0, 1])}
    arguments |= {"class_counts": COUNTS, "num_labeled": 4, "num_unlabeled": 5}
    with pytest.raises(ValueError, match=message):
        class_thresholds(**{**arguments, **change})


def test_reliable_and_undecided_by_hand():
    labels = _filter(reliable_fraction=0.5)
    image = make_detections([0.9, 0.8, 0.7, 0.6, 0.3, 0.2], [0, 1, 0, 0, 0, 2])
    # One image of four: one box of six and three expected; the classes' best are reliable.
    (kept,) = labels([image])
    assert kept.scores.tolist() == pytest.approx([0.9, 0.8, 0.2])
    assert kept.reliable.tolist() == [True, True, True]
    # Six images: 9, 4 and 1 expected, half of them reliable.
    labels([make_detections([0.85, 0.1], [0, 1])] + [make_detections([], [])] * 4)
    assert labels.uncertain_thresh.tolist() == pytest.approx([0.3, 0.1, 0.2])
    assert labels.reliable_thresh.tolist() == pytest.approx([0.6, 0.1, 0.2])
    kept, nothing = labels.eval()([image, make_detections([0.29, 0.05], [0, 2])])
    assert len(nothing) == 0
    assert kept.reliable.tolist() == [True, True, True, True, False, True]
    assert kept.weights.tolist() == kept.box_weights.tolist() == [1, 1, 1, 1, 0, 1]
    assert torch.equal(kept.boxes, image.boxes) and torch.equal(kept.classes, image.classes)


def test_the_images_of_the_queue_keep_as_many_boxes_as_labels_make_expect():
    labels = _filter(queue_images=40, max_detections=30)
    images = random_images(torch.Generator().manual_seed(1), [30] * 40, low=0.1)
    kept = labels(images)
    expected = COUNTS.clamp(min=1) * 40 // NUM_LABELED
    assert torch.equal(_flat(kept, "classes").bincount(minlength=3), expected)
    reliable = _flat(kept, "classes")[_flat(kept, "reliable")].bincount(minlength=3)
    assert reliable.tolist() == [int(0.2 * k + 1e-9) for k in expected.tolist()]


def test_undecided_boxes_are_neither_objects_nor_background():
    labels = _filter().eval()
    (kept,) = labels([make_detections([0.9, 0.6], [0, 1])])
    assert kept.reliable.tolist() == [False, False]  # before there are thresholds
    targets = kept.to_targets()
    regions = [torch.rand(3, 4)], [torch.tensor([0, 1, 3])], [torch.tensor([0, 1, 1])]
    samples = RegionSamples.from_matches(*regions, [targets], NUM_CLASSES)
    assert samples.weights.tolist() == samples.box_weights.tolist() == [0, 0, 1]
    assert (targets.weights < get_config().SSOD.RPN_IGNORE_WEIGHT).all()


@pytest.mark.parametrize("source", ["queue", "sweep"])
def test_without_thresholds_all_above_the_floor_is_undecided(source):
    labels = _filter(source=source, min_score=0.3).eval()
    (kept,) = labels([make_detections([1.0, 0.5, 0.3, 0.29], [0, 1, 2, 0])])
    assert kept.scores.tolist() == pytest.approx([1.0, 0.5, 0.3])
    assert not kept.reliable.any() and not kept.weights.any()
    metrics = {name: float(value) for name, value in labels.metrics().items()}
    assert metrics == pytest.approx({"pseudo/reliable_thresh": 1, "pseudo/uncertain_thresh": 0.3})


def test_thresholds_are_those_of_the_last_images_and_refreshed_when_due(monkeypatch):
    labels = _filter(queue_images=9, refresh_period=4)
    refreshed = []
    original = labels.set_thresholds_from
    monkeypatch.setattr(
        labels, "set_thresholds_from", lambda *a: (refreshed.append(labels.calls), original(*a))
    )
    batches = _batches(12)
    for call, batch in enumerate(batches):
        labels(batch)
        if call in (0, 1, 2, 4, 8):  # while the queue fills, then every fourth call
            images = [image for b in batches[max(call - 2, 0) : call + 1] for image in b]
            scores, classes = _flat(images, "scores"), _flat(images, "classes")
            arguments = (COUNTS, NUM_LABELED, len(images), 0.2, 0.05)
            reliable, uncertain = _reference(scores, classes, *arguments)
        assert labels.reliable_thresh.tolist() == pytest.approx(reliable)
        assert labels.uncertain_thresh.tolist() == pytest.approx(uncertain)
    assert refreshed == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_period_is_of_iterations_however_many_passes_they_have(passes, monkeypatch):
    labels = _filter(queue_images=3, refresh_period=4, passes=passes)
    refreshed = []
    original = labels.set_thresholds_from
    monkeypatch.setattr(
        labels, "set_thresholds_from", lambda *a: (refreshed.append(labels.calls), original(*a))
    )
    for batch in _batches(9 * passes):  # the first fills the queue
        labels(batch)
    assert refreshed == [0, 4 * passes, 8 * passes]


@pytest.mark.parametrize("source", ["queue", "sweep"])
def test_a_sweep_is_asked_for_at_once_and_every_period(source):
    labels = _filter(source=source, refresh_period=4, sweep_images=7)
    size = 7 if source == "sweep" else None
    assert [labels.sweep_request(i) for i in (0, 1, 5)] == [size] * 3  # there are no thresholds
    labels.set_thresholds_from(torch.rand(9), torch.zeros(9).long(), 3)
    assert [i for i in range(10) if labels.sweep_request(i)] == ([0, 4, 8] if size else [])


def test_a_slowly_filling_queue_is_refreshed_each_time_it_has_a_tenth_more():
    labels = _filter(queue_images=64, refresh_period=10**6)
    seen = []
    for batch in _batches(70, sizes=(2,)):
        labels(batch)
        seen.append(labels.images_at_refresh)
    assert seen[:11] == list(range(1, 12))
    assert all(10 * min(n, 64) < 11 * last for n, last in enumerate(seen, 1))
    assert len(set(seen)) < 35


def test_sweep_sets_thresholds_and_training_does_not():
    labels = _filter(source="sweep")
    scores, classes = torch.rand(60, dtype=torch.float64), torch.randint(4, (60,))
    labels.set_thresholds_from(scores, classes, num_images=20)
    expected = _reference(scores.float(), classes, COUNTS, NUM_LABELED, 20, 0.2, 0.05)
    assert labels.reliable_thresh.tolist() == pytest.approx(expected[0], abs=1e-7)
    assert labels.uncertain_thresh.tolist() == pytest.approx(expected[1], abs=1e-7)
    before = _state(labels)
    assert not any("queue" in name for name in before)
    labels(_batches(1)[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(labels).items())
    assert float(labels.metrics()["pseudo/uncertain_thresh"]) == pytest.approx(
        sum(expected[1]) / NUM_CLASSES
    )


def test_empty_batches_are_images_without_boxes():
    labels = _filter(queue_images=4)
    (kept,) = labels([make_detections([0.9, 0.8], [0, 0])])
    assert len(kept) == 1
    for _ in range(4):
        assert [len(k) for k in labels([make_detections([], [])])] == [0]
    assert labels.calls == 5
    # The boxes have left the queue: what the class gets without detections.
    labels.calls = 6
    labels([make_detections([], [])])
    assert labels.uncertain_thresh.tolist() == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("saved_at", [1, 2, 5])
def test_resumed_run_equals_an_uninterrupted_one(saved_at):
    batches = _batches(9)
    whole = _filter()
    for batch in batches[:saved_at]:
        whole(batch)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = AdaptiveClassThreshold(
        NUM_CLASSES, queue_images=6, refresh_period=3, max_detections=8
    )
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[saved_at:]:
        for a, b in zip(whole(batch), resumed(batch), strict=True):
            assert torch.equal(a.scores, b.scores) and torch.equal(a.weights, b.weights)
        states = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_eval_mode_changes_nothing():
    labels = _filter()
    first, second = _batches(2)
    labels(first)
    before = _state(labels)
    labels.eval()(second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(labels).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_input_does_not_change_the_state(dtype):
    labels = _filter(queue_images=3, refresh_period=1)  # the images of one batch
    before = {name: tensor.dtype for name, tensor in labels.state_dict().items()}
    for batch in _batches(3, dtype=dtype):
        kept = labels(batch)
        # Scores and thresholds are compared in one type: the best of each class is kept.
        assert set(_flat(kept, "classes").tolist()) == set(_flat(batch, "classes").tolist())
        assert all(k.weights.dtype == dtype for k in kept)
    assert {name: tensor.dtype for name, tensor in labels.state_dict().items()} == before


def test_input_is_not_changed():
    batch = _batches(1, sizes=(12, 3))[0]
    before = copy.deepcopy(batch)
    _filter()(batch)
    for image, copied in zip(batch, before, strict=True):
        assert all(torch.equal(getattr(image, n), t) for n, t in vars(copied).items())


def test_nan_is_never_kept_and_reported_when_thresholds_are_computed():
    labels = _filter(refresh_period=2)
    clean = _batches(4)
    for batch in clean[:2]:
        labels(batch)
    assert labels.calls == 2
    labels.calls = 1  # not due
    bad = make_detections([0.9, 0.8], [0, 1])
    bad.scores[0] = math.nan
    (kept, _, _) = labels([bad, *clean[2][1:]])
    assert kept.scores.tolist() == pytest.approx([0.8])
    with pytest.raises(ValueError, match="got 1 NaN among"):
        labels(clean[3][:1])


def test_the_host_is_asked_once_a_batch_between_refreshes():
    labels = _filter()
    for batch in _batches(2):
        labels(batch)
    (batch,) = _batches(1)
    with HostReads() as reads:
        labels(batch)
        labels.metrics()
    assert reads.count == 1


def test_labels_must_be_told_first():
    labels = AdaptiveClassThreshold(NUM_CLASSES)
    with pytest.raises(ValueError, match="AdaptiveClassThreshold needs the number of labeled"):
        labels(_batches(1)[0])
    with pytest.raises(ValueError, match="call its set_label_distribution before training"):
        labels.set_thresholds_from(torch.rand(1), torch.zeros(1).long(), 1)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("source", "file", 'SSOD.FILTER.SOURCE must be "queue" or "sweep", got "file"'),
        ("refresh_period", 0, "SSOD.FILTER.REFRESH_PERIOD must be at least 1, got 0"),
        ("queue_images", 0, "SSOD.FILTER.QUEUE_IMAGES must be at least 1, got 0"),
        ("sweep_images", -1, "SSOD.FILTER.SWEEP_IMAGES must be at least 1, got -1"),
        ("max_detections", -1, "TEST.DETECTIONS_PER_IMAGE must be at least 1, got -1"),
        ("reliable_fraction", 1.5, r"SSOD.FILTER.RELIABLE_FRACTION must be in \[0, 1\], got 1.5"),
        ("min_score", -0.5, r"min_score must be in \[0, 1\], got -0.5"),
        ("min_score", math.nan, r"min_score must be in \[0, 1\], got nan"),
    ],
)
def test_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        AdaptiveClassThreshold(NUM_CLASSES, **{argument: value})
