from collections import Counter
from itertools import chain

import numpy as np
import pytest

from ssod.data.sampler import LABELED, UNLABELED, TwoStreamSampler
from ssod.errors import InputError


def _ratios(size, seed=0):
    return np.exp(np.random.default_rng(seed).uniform(-1, 1, size)).astype(np.float32)


def _batches(num_labeled=20, num_unlabeled=50, **kwargs):
    arguments = {
        "labeled_batch": 4,
        "unlabeled_batch": 8,
        "burn_in_iters": 0,
        "seed": 1,
        "start_iter": 0,
        "max_iter": 60,
    }
    unlabeled = None if num_unlabeled is None else _ratios(num_unlabeled, 1)
    sampler = TwoStreamSampler(_ratios(num_labeled), unlabeled, **{**arguments, **kwargs})
    batches = list(sampler)
    assert len(sampler) == len(batches)
    return batches


SHAPES = [
    # labeled images, unlabeled images, labeled batch, unlabeled batch, ranks
    (20, 50, 4, 4, 1),
    (20, 50, 2, 8, 2),
    (7, 1000, 4, 16, 4),
    (3, 5, 8, 32, 2),
    (1, 1, 4, 4, 1),
    (400, 401, 6, 2, 2),
]


@pytest.mark.parametrize(("n_l", "n_u", "b_l", "b_u", "world_size"), SHAPES)
def test_every_epoch_visits_every_image_once(n_l, n_u, b_l, b_u, world_size):
    arguments = {"labeled_batch": b_l, "unlabeled_batch": b_u, "world_size": world_size}
    ranks = [_batches(n_l, n_u, max_iter=200, rank=r, **arguments) for r in range(world_size)]
    keys = list(chain.from_iterable(chain.from_iterable(ranks)))
    for stream, size, batch in ((LABELED, n_l, b_l), (UNLABELED, n_u, b_u)):
        index_at = {key.n: key.index for key in keys if key.stream == stream}
        assert len(index_at) == sum(key.stream == stream for key in keys) == 200 * batch
        # The last window is cut short by the end of training; positions before it are complete.
        positions = range(max(index_at) + 1)
        complete = next((n for n in positions if n not in index_at), len(positions))
        assert complete > 200 * batch - 20 * batch
        for epoch in range(complete // size):
            visited = [index_at[epoch * size + offset] for offset in range(size)]
            assert sorted(visited) == list(range(size))


def test_epochs_and_streams_are_shuffled_differently():
    keys = list(chain.from_iterable(_batches(40, 40, unlabeled_batch=4)))
    orders = {}
    for key in sorted(keys):
        orders.setdefault((key.stream, key.n // 40), []).append(key.index)
    assert len({tuple(order) for order in orders.values()}) == len(orders) == 12


@pytest.mark.parametrize("start_iter", [1, 7, 20, 33, 59])
def test_resuming_continues_with_the_same_batches(start_iter):
    arguments = {"burn_in_iters": 20, "num_labeled": 300, "num_unlabeled": 70}
    complete = _batches(**arguments)
    assert _batches(start_iter=start_iter, **arguments) == complete[start_iter:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_have_the_batch_of_one(world_size):
    ranks = [_batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    for together, *parts in zip(_batches(), *ranks, strict=True):
        for stream in (LABELED, UNLABELED):
            joined = [key for part in parts for key in part if key.stream == stream]
            assert joined == [key for key in together if key.stream == stream]
            assert len({sum(k.stream == stream for k in part) for part in parts}) == 1


def test_unlabeled_stream_starts_at_its_beginning_after_burn_in():
    batches = _batches(burn_in_iters=30)
    assert {key.stream for keys in batches[:30] for key in keys} == {LABELED}
    without_burn_in = _batches()
    for t in range(30, 60):
        assert [k for k in batches[t] if k.stream == LABELED] == batches[t][:4]
        assert batches[t][4:] == without_burn_in[t - 30][4:]


@pytest.mark.parametrize("kwargs", [{"unlabeled_batch": 0}, {"num_unlabeled": None}])
def test_labeled_only(kwargs):
    batches = _batches(**kwargs)
    assert batches == [keys[:4] for keys in _batches()]


def test_seed_changes_the_order():
    assert _batches(seed=1) == _batches(seed=1) != _batches(seed=2)


def test_batches_have_similar_aspect_ratios():
    ratios = _ratios(2000)
    batches = _batches(2000, None, labeled_batch=8, max_iter=250)
    spread = np.mean([np.ptp(ratios[[key.index for key in keys]]) for keys in batches])
    rng = np.random.default_rng(0)
    by_chance = np.mean([np.ptp(ratios[rng.choice(2000, 8, replace=False)]) for _ in range(250)])
    assert spread < 0.2 * by_chance


def test_a_window_is_not_walked_through_in_order_of_ratio():
    ratios = _ratios(2000)
    batches = _batches(2000, None, labeled_batch=8, max_iter=160)
    means = [ratios[[key.index for key in keys]].mean() for keys in batches]
    rising = np.mean(np.diff(means) > 0)
    assert 0.35 < rising < 0.65
    orders = {tuple(np.argsort(means[i : i + 16])) for i in range(0, 160, 16)}
    assert len(orders) == 10


def test_small_sets_do_not_repeat_their_batches():
    batches = _batches(40, None, labeled_batch=4, max_iter=200)
    images = Counter(frozenset(key.index for key in keys) for keys in batches)
    assert max(images.values()) <= 3
    # An image meets itself only where an epoch ends inside a batch, which 40 / 4 rules out.
    assert all(len(batch) == 4 for batch in images)


def test_a_million_images_and_a_late_start():
    size = 1_000_000
    ratios = np.linspace(0.5, 2, size, dtype=np.float32)
    sampler = TwoStreamSampler(
        ratios,
        ratios,
        labeled_batch=16,
        unlabeled_batch=64,
        burn_in_iters=2000,
        seed=0,
        start_iter=170_000,
        max_iter=170_020,
    )
    assert all(len(keys) == 80 for keys in sampler)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labeled_batch": 3, "world_size": 2}, r"SOLVER\.IMS_PER_BATCH .* number 2, .* got 3"),
        ({"labeled_batch": 0}, r"SOLVER\.IMS_PER_BATCH .* at least 1, got 0"),
        ({"unlabeled_batch": 6, "world_size": 4}, r"SSOD\.DATA\.UNLABELED_PER_BATCH .* got 6"),
        ({"unlabeled_batch": -4}, r"SSOD\.DATA\.UNLABELED_PER_BATCH .* got -4"),
        ({"num_labeled": 0}, "the labeled set has no images"),
        ({"num_unlabeled": 0}, "the unlabeled set has no images"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        _batches(**kwargs)
