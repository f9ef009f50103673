import math
import random
import subprocess
import sys
from collections import Counter

import pytest

from ssod.data.splits import make_split, make_stratified_split
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


def _long_tail(num_images=2000, num_classes=12):
    """Classes by image id: from one in two images to one in 200, some images without any."""
    rng = random.Random(0)
    shares = [0.5 * 0.01 ** (k / (num_classes - 1)) for k in range(num_classes)]
    return {
        3 * i: [k for k, share in enumerate(shares) if rng.random() < share]
        for i in range(num_images)
    }


def _images_per_class(classes_of, image_ids):
    return Counter(label for image_id in image_ids for label in classes_of[image_id] or ["none"])


@pytest.mark.parametrize("percent", [0.5, 1, 7, 10, 50, 90])
def test_stratified_split_has_the_least_number_of_each_class(percent):
    classes_of = _long_tail()
    split = make_stratified_split(classes_of, percent, 1)
    assert len(set(split)) == len(split) and set(split) <= set(classes_of)
    everywhere = _images_per_class(classes_of, classes_of)
    chosen = _images_per_class(classes_of, split)
    for label, number in everywhere.items():
        assert chosen[label] >= max(label != "none", math.floor(percent * number / 100))
    uniform = make_split(classes_of, percent, 1)
    assert len(uniform) <= len(split) <= 1.05 * len(uniform) + len(everywhere)


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_is_closer_to_the_shares_than_chance(seed):
    classes_of = _long_tail()
    everywhere = _images_per_class(classes_of, classes_of)

    def deviation(split):
        chosen = _images_per_class(classes_of, split)
        return sum(abs(10 * chosen[label] / number - 1) for label, number in everywhere.items())

    stratified, uniform = (f(classes_of, 10, seed) for f in (make_stratified_split, make_split))
    assert deviation(stratified) < 0.8 * deviation(uniform)


def test_stratified_split_of_exclusive_classes_has_exact_shares():
    classes_of = {f"{label}/{i}": [label] for label in (2, 5, 9) for i in range(20 * label)}
    split = make_stratified_split(classes_of, 10, 4)
    assert _images_per_class(classes_of, split) == {2: 4, 5: 10, 9: 18}


def test_stratified_split_takes_one_image_of_each_class():
    assert set(make_stratified_split({1: [0], 2: [1], 3: [], 4: [2, 2]}, 1, 0)) == {1, 2, 4}
    # One image has both classes, but the rare class has another one too.
    classes_of = {0: [7], 1: [7, 8], **{i: [8] for i in range(2, 100)}}
    for seed in range(20):
        labels = [classes_of[i] for i in make_stratified_split(classes_of, 1, seed)]
        assert {7, 8} == set(sum(labels, []))


def test_stratified_split_is_that_of_one_class_if_there_is_only_one():
    assert make_stratified_split({i: [3] for i in IDS}, 5, 1) == make_split(IDS, 5, 1)
    assert make_stratified_split({i: [] for i in IDS}, 5, 1) == make_split(IDS, 5, 1)


def test_stratified_split_depends_on_ids_and_seed_only():
    classes_of = _long_tail(300)
    backwards = {i: classes_of[i][::-1] * 2 for i in reversed(classes_of)}
    split = make_stratified_split(classes_of, 10, 1)
    assert make_stratified_split(backwards, 10, 1) == split
    assert make_stratified_split(classes_of, 10, 2) != split


def test_ids_that_are_not_unicode():
    assert len(make_split(["\ud800", "a", "b"], 50, 0)) == 2


def test_ids_that_are_not_text():
    names = [f"\udcff{i}.jpg" for i in range(20)]
    assert set(make_split(names, 20, 0)) < set(make_split(names, 40, 0)) < set(names)
