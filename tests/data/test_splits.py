import math
import subprocess
import sys

import pytest

from ssod.data.splits import make_split
from ssod.errors import InputError

IDS = list(range(0, 3000, 3))


def test_does_not_depend_on_the_order_of_ids():
    assert make_split(IDS[::-1], 5, 1) == make_split(IDS, 5, 1)


@pytest.mark.parametrize("ids", [IDS, [f"folder/{i}.jpg" for i in IDS], [1, "a", 2, "b"]])
def test_returns_unique_members(ids):
    split = make_split(ids, 10, 0)
    assert len(set(split)) == len(split) == max(1, len(ids) // 10)
    assert set(split) <= set(ids)


def test_smaller_splits_are_contained_in_larger_ones():
    splits = [set(make_split(IDS, percent, 3)) for percent in (0.5, 1, 5, 10, 50, 99)]
    assert all(small < large for small, large in zip(splits, splits[1:], strict=False))


@pytest.mark.parametrize("percent", [0.01, 0.15, 1, 2.5, 33, 66.65, 99.9])
def test_size_is_rounded_half_up_and_never_zero(percent):
    assert len(make_split(IDS, percent, 0)) == max(1, math.floor(percent * 10 + 0.5))


def test_seeds_overlap_as_much_as_chance():
    one, two = (set(make_split(IDS, 50, seed)) for seed in (1, 2))
    # Hypergeometric: mean 250, standard deviation 8.
    assert 210 < len(one & two) < 290


def test_another_process_finds_the_same_split():
    code = f"from ssod.data.splits import make_split; print(make_split({IDS[:100]}, 7, 5))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(make_split(IDS[:100], 7, 5))


@pytest.mark.parametrize("percent", [0, -1, 100, 250, float("nan")])
def test_percent_out_of_range(percent):
    with pytest.raises(InputError, match=r"SSOD.DATA.PERCENT must be in \(0, 100\), got"):
        make_split(IDS, percent, 0)


@pytest.mark.parametrize("ids", [["a", "b", "a"], [1, 2, 1], [1, 2, "1"], [10**20, 10**20]])
def test_repeated_ids(ids):
    with pytest.raises(InputError, match="image ids must be unique .* twice"):
        make_split(ids, 10, 0)


def test_no_ids():
    with pytest.raises(InputError, match="at least one image"):
        make_split([], 10, 0)


def test_ids_that_are_not_text():
    names = [f"\udcff{i}.jpg" for i in range(20)]
    assert set(make_split(names, 20, 0)) < set(make_split(names, 40, 0)) < set(names)
