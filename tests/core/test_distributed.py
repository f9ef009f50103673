import math

import pytest
import torch
import torch.distributed as dist

from ssod.core.distributed import (
    all_gather,
    all_reduce_sum,
    get_rank,
    get_world_size,
    seed_step,
)
from ssod.hosts.metric_window import MetricWindow

WORLD_SIZE = 2
SEED = 3
ITERATIONS = 5
DTYPES = (torch.float32, torch.float64)


def _block(rank, dtype, transposed=False):
    """A block that no arithmetic gives back: of a rank, as a transposed view or as it is."""
    block = torch.tensor([[0.1, math.inf, math.nan], [-0.0, -1.0, 3e-40]], dtype=dtype)
    block[1, 1] = rank
    return block.T if transposed else block


def _draw(seed, iteration):
    seed_step(seed, iteration)
    return torch.rand(4)


def _work(rank, folder):
    """Call every function on one of two ranks and leave what it returned in a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD_SIZE
    )
    values = torch.tensor([1.0, 10.0]) * (rank + 1)
    scalars = {"a": torch.tensor(float(rank)), "b": torch.tensor(3.0 - 2 * rank)}
    window = MetricWindow()
    # The names come in another order on the other rank.
    window.add(dict(sorted(scalars.items(), reverse=rank == 1)))
    for flag in (True, False):
        window.add_flag(torch.tensor(flag))
    blocks = {
        (dtype, transposed): all_gather(_block(rank, dtype, transposed))
        for dtype in DTYPES
        for transposed in (False, True)
    }
    results = {
        "gathered": blocks,
        "gathered_shapes": [tuple(all_gather(torch.ones(s)).shape) for s in ((), (0, 3))],
        "rank": get_rank(),
        "world_size": get_world_size(),
        "sum": all_reduce_sum(values),
        "input_after_sum": values,
        "window": window.read([rank, 10], {"seconds": 0.25 * (1 + rank)}),
        "draws": torch.stack([_draw(SEED, iteration) for iteration in range(ITERATIONS)]),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of two gloo processes, by rank."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(_work, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


def test_every_process_knows_its_place(ranks):
    assert [result["rank"] for result in ranks] == [0, 1]
    assert [result["world_size"] for result in ranks] == [2, 2]


def test_every_rank_gets_the_sum_and_keeps_its_input(ranks):
    assert [result["sum"].tolist() for result in ranks] == [[3.0, 30.0]] * 2
    assert [result["input_after_sum"].tolist() for result in ranks] == [[1.0, 10.0], [2.0, 20.0]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_gets_all_blocks_exactly_and_in_order(ranks, dtype, transposed):
    expected = torch.stack([_block(rank, dtype, transposed) for rank in range(WORLD_SIZE)])
    for result in ranks:
        gathered = result["gathered"][dtype, transposed]
        torch.testing.assert_close(gathered, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(gathered.signbit(), expected.signbit())


def test_blocks_of_any_shape_are_gathered(ranks):
    assert [result["gathered_shapes"] for result in ranks] == [[(2,), (2, 0, 3)]] * 2


def test_gathering_in_a_single_process_is_a_view():
    block = torch.ones(2, 3)
    gathered = all_gather(block)
    gathered += 1
    assert gathered.shape == (1, 2, 3) and (block == 2).all()


def test_a_window_has_the_means_of_all_ranks_the_sums_and_the_slowest(ranks):
    expected = ({"a": 0.5, "b": 2.0, "seconds": 0.5}, [True, False], [1, 20])
    assert [result["window"] for result in ranks] == [expected] * 2


def test_draws_differ_between_ranks_and_rank_0_draws_like_a_single_process(ranks):
    single = torch.stack([_draw(SEED, iteration) for iteration in range(ITERATIONS)])
    assert torch.equal(ranks[0]["draws"], single)
    everything = torch.cat([result["draws"] for result in ranks])
    assert len(everything.unique(dim=0)) == WORLD_SIZE * ITERATIONS


def test_a_single_process_is_rank_0_of_1():
    assert (get_rank(), get_world_size()) == (0, 1)


def test_sum_in_a_single_process_is_a_copy():
    values = torch.tensor([1.0, 2.0])
    total = all_reduce_sum(values)
    total += 1
    assert total.tolist() == [2.0, 3.0]
    assert values.tolist() == [1.0, 2.0]


def test_draws_depend_on_seed_and_iteration_alone():
    first = _draw(1, 7)
    torch.rand(100)
    _draw(2, 7)
    assert torch.equal(_draw(1, 7), first)


def test_neighboring_seeds_and_iterations_draw_differently():
    draws = torch.stack([_draw(seed, iteration) for seed in range(3) for iteration in range(50)])
    assert len(draws.unique(dim=0)) == 150


def test_any_32_bit_seed_is_accepted():
    assert not torch.equal(_draw(2**32 - 1, 0), _draw(2**32 - 1, 1))
