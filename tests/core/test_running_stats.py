import math

import pytest
import torch
import torch.distributed as dist
from test_filters import make_detections, random_images

from ssod.core.adaptive_threshold import AdaptiveClassThreshold
from ssod.core.gaussian_mixture import GaussianMixtureThreshold
from ssod.core.running_stats import (
    LabelDistribution,
    RunningAverage,
    RunningSums,
    ScoreQueue,
)
from ssod.core.soft_match import SoftMatchWeighting

NUM_CLASSES = 3
WORLD_SIZE = 2
# Detections of the images of ranks 0 and 1: on some steps one rank, or both, find nothing.
SIZES = [([3, 2], [0, 0]), ([0, 0], [0, 0]), ([1, 0], [4, 9]), ([0, 0], [5, 1]), ([2, 2], [2, 2])]


def _filters():
    filters = {
        "act": AdaptiveClassThreshold(
            NUM_CLASSES, queue_images=10, refresh_period=2, max_detections=6
        ),
        "soft": SoftMatchWeighting(NUM_CLASSES, ema_decay=0.9, pool_floor=0.3),
        "per_class": SoftMatchWeighting(
            NUM_CLASSES, ema_decay=0.9, scope="per_class", alignment="uniform"
        ),
        "paper": SoftMatchWeighting(NUM_CLASSES, ema_decay=0.9, start="paper", alignment="none"),
        "gmm": GaussianMixtureThreshold(NUM_CLASSES, num_scores=8, max_detections=6),
    }
    for labels in filters.values():
        labels.set_label_distribution(torch.tensor([5, 2, 1]), 3)
    return filters


def _run(rank=None):
    """Weights and states after every step, of one rank's images or (None) of all."""
    torch.manual_seed(0)
    filters, history = _filters(), []
    for step, sizes in enumerate(SIZES):
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)
        images = random_images(generator, sizes[0] + sizes[1])
        mine = images if rank is None else images[2 * rank : 2 * rank + 2]
        history.append(
            {
                name: ([k.weights for k in labels(mine)], dict(_cloned(labels)))
                for name, labels in filters.items()
            }
        )
    return history


def _cloned(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD_SIZE
    )
    torch.save(_run(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of two gloo processes, by rank."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(_work, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("name", ["act", "soft", "per_class", "paper", "gmm"])
def test_two_ranks_equal_one(ranks, name):
    for whole, *parts in zip(_run(), *ranks, strict=True):
        weights, state = whole[name]
        for (_, actual), tolerance in zip((p[name] for p in parts), (1e-12, 0), strict=True):
            expected = state if tolerance else parts[0][name][1]  # ranks agree exactly
            assert actual.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(actual[key], tensor, rtol=tolerance, atol=tolerance)
        found = [w for p in parts for w in p[name][0]]
        torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("keep_absent", [False, True])
def test_sums_follow_the_recurrence(keep_absent):
    torch.manual_seed(0)
    sums = RunningSums(3, 2, decay=0.75, keep_absent=keep_absent)
    expected = [[0.0] * 3 for _ in range(3)]
    for step in range(12):
        batch = torch.rand(3, 3, dtype=torch.float64) + 1
        batch[step % 3] = 0
        if step % 4 == 0:
            batch.zero_()
        sums.update(batch)
        for old, new in zip(expected, batch.tolist(), strict=True):
            if new[0] > 0 or not keep_absent:
                old[:] = [0.75 * a + 0.25 * b for a, b in zip(old, new, strict=True)]
        averages = [[v / (n or 1) for v in values] for n, *values in expected]
        torch.testing.assert_close(sums.averages(), torch.tensor(averages, dtype=torch.float64))
        assert sums.seen().tolist() == [n > 0 for n, *_ in expected]


def test_absent_groups_are_kept_bit_by_bit():
    sums = RunningSums(2, 1, decay=0.999, keep_absent=True)
    sums.update(torch.tensor([[3.0, 0.7], [1.0, 0.2]], dtype=torch.float64))
    before = sums.sums.clone()
    for _ in range(50):
        sums.update(torch.tensor([[0.0, 0.0], [1.0, 0.2]], dtype=torch.float64))
    assert torch.equal(sums.sums[0], before[0])


def test_averages_start_from_the_first_batch_or_a_value():
    batch, valid = (
        torch.tensor([[0.5, math.nan]], dtype=torch.float64),
        torch.tensor([[True, False]]),
    )
    first, given = RunningAverage(1, 2, 0.75), RunningAverage(1, 2, 0.75, [0.1, 1.0])
    for average in (first, given):
        average.update(batch, valid)
    assert first.averages().tolist() == [[0.5, 0.0]]
    assert given.averages()[0].tolist() == pytest.approx([0.75 * 0.1 + 0.25 * 0.5, 1.0])
    assert (first.seen().tolist(), given.seen().tolist()) == ([False], [True])
    first.update(torch.tensor([[0.9, 0.3]], dtype=torch.float64), torch.tensor([[True]]))
    assert first.averages()[0].tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 0.9, 0.3])


@pytest.mark.parametrize("capacity", [1, 2, 5, 7, 100])
def test_queue_holds_the_best_detections_of_the_last_images(capacity):
    generator = torch.Generator().manual_seed(0)
    queue, images = ScoreQueue(NUM_CLASSES, capacity, max_detections=4), []
    for sizes in [(3, 0), (9,), (), (1, 4, 5), (0,), (2,) * 8, (6, 6)]:
        batch = random_images(generator, sizes)
        images = (images + batch)[-capacity:]
        queue.push(batch)
        scores, classes = queue.scores_and_classes()
        assert len(scores) == 4 * len(images) and queue.num_filled == len(images)
        real = classes < NUM_CLASSES
        assert (classes[~real] == NUM_CLASSES).all() and not scores[~real].any()
        found = sorted(zip(scores[real].tolist(), classes[real].tolist(), strict=True))
        expected = [
            row
            for i in images
            for row in zip(i.scores[:4].tolist(), i.classes[:4].tolist(), strict=True)
        ]
        assert found == sorted(expected)


def test_queue_does_not_rely_on_the_order_of_detections():
    queue = ScoreQueue(NUM_CLASSES, 1, max_detections=2)
    queue.push([make_detections([0.1, 0.7, 0.2, 0.9], [0, 1, 2, 0])])
    scores, classes = queue.scores_and_classes()
    assert scores.tolist() == pytest.approx([0.9, 0.7]) and classes.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("counts", "num_labeled", "message"),
    [
        ([1, 2], 1, r"class_counts must be 3 numbers of boxes, one a class, got \[1, 2\]"),
        ([1, -2, 3], 1, r"got \[1, -2, 3\]"),
        ([1, 2, 3], 0, "num_labeled must be at least 1 image, got 0"),
    ],
)
def test_labels_that_cannot_be_are_refused(counts, num_labeled, message):
    with pytest.raises(ValueError, match=message):
        LabelDistribution(NUM_CLASSES).set(torch.tensor(counts), num_labeled)


def test_labels_are_saved():
    labels, loaded = LabelDistribution(NUM_CLASSES), LabelDistribution(NUM_CLASSES)
    labels.set(torch.tensor([4, 0, 2]), 3)
    loaded.load_state_dict(labels.state_dict())
    loaded.check_known("a filter")
    assert (loaded.class_counts.tolist(), loaded.num_labeled) == ([4, 0, 2], 3)
