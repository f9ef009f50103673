import pytest
import torch
from torchvision.ops import box_iou

from ssod.core.sampling import weighted_first

MIN_IOU, MAX_OBJECTS = 0.5, 6


def _regions(seed, num_boxes=4, num_regions=60):
    """Overlaps of random boxes and of regions around them, and weights of 0 and others."""
    generator = torch.Generator().manual_seed(seed)
    corners = 40 * torch.rand(num_boxes, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corners, corners + 20], 1)
    around = boxes[torch.randint(num_boxes, (num_regions,), generator=generator)]
    regions = around + 6 * torch.randn(num_regions, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_boxes, generator=generator)
    weights[torch.rand(num_boxes, generator=generator) < 0.5] = 0
    return box_iou(boxes, regions), weights


def _reference(overlaps, weights):
    """What each region is, one after the other: "sure", "last" or "background"."""
    kinds, rows = [], []
    for region in overlaps.T.tolist():
        sure = [iou if w > 0 else 0.0 for iou, w in zip(region, weights.tolist(), strict=True)]
        values = sure if max(sure) >= MIN_IOU else region
        rows.append(values.index(max(values)))
        is_sure = max(sure) >= MIN_IOU
        kinds.append("sure" if is_sure else "last" if max(region) >= MIN_IOU else "background")
    return kinds, rows


@pytest.mark.parametrize("seed", range(20))
def test_regions_of_weight_zero_take_the_places_that_are_left(seed):
    overlaps, weights = _regions(seed)
    kinds, rows = _reference(overlaps, weights)
    changed, surplus = weighted_first(overlaps, weights, MIN_IOU, MAX_OBJECTS)
    best, row = changed.max(0)
    assert [kind != "background" for kind in kinds] == (best >= MIN_IOU).tolist()
    objects = best >= MIN_IOU
    assert torch.tensor(rows)[objects].tolist() == row[objects].tolist()
    # Only regions of weight 0 are too many, and as many as there is no place for.
    is_last = torch.tensor([kind == "last" for kind in kinds])
    assert not (surplus & ~is_last).any()
    room = max(MAX_OBJECTS - kinds.count("sure"), 0)
    assert (is_last & ~surplus).sum() == min(room, kinds.count("last"))


def test_the_random_cases_have_every_kind_and_a_surplus():
    found = [_regions(seed) for seed in range(20)]
    kinds = [_reference(*case)[0] for case in found]
    assert any(k.count("sure") > MAX_OBJECTS for k in kinds)
    assert any(0 < k.count("sure") < MAX_OBJECTS < k.count("sure") + k.count("last") for k in kinds)
    both = [((o >= MIN_IOU) & (w > 0)[:, None]).any(0) for o, w in found]
    also = [((o >= MIN_IOU) & (w == 0)[:, None]).any(0) for o, w in found]
    assert any((a & b).any() for a, b in zip(both, also, strict=True))


def test_weights_above_zero_change_nothing():
    overlaps, _ = _regions(0)
    changed, surplus = weighted_first(overlaps, torch.full((4,), 1e-6), MIN_IOU, 1)
    assert torch.equal(changed, overlaps)
    assert not surplus.any()


def test_those_that_stay_are_spread_over_the_regions_without_random_draws():
    overlaps = torch.full((1, 1000), 0.9)
    state = torch.get_rng_state()
    _, surplus = weighted_first(overlaps, torch.zeros(1), MIN_IOU, 100)
    assert torch.equal(torch.get_rng_state(), state)
    in_each_tenth = (~surplus).view(10, 100).sum(1)
    assert in_each_tenth.sum() == 100
    assert in_each_tenth.min() >= 8


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_match(shape):
    overlaps = torch.rand(shape)
    changed, surplus = weighted_first(overlaps, torch.zeros(shape[0]), MIN_IOU, 3)
    assert changed.shape == shape
    assert surplus.tolist() == [False] * shape[1]
