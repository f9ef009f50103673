import math

import pytest
import torch

from ssod.core.geometry import MIN_VISIBLE, map_boxes, transfer_boxes, view_matrix


def _map_box_slowly(box, matrix):
    """Map all four corners one by one and take their bounds."""
    x1, y1, x2, y2 = box.tolist()
    points = []
    for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2)):
        points.append([sum(matrix[r, c] * v for c, v in enumerate((x, y, 1.0))) for r in (0, 1)])
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


@pytest.mark.parametrize("flip_width", [None, 97.0])
@pytest.mark.parametrize("num_boxes", [0, 1, 6])
def test_matches_points_mapped_one_by_one(num_boxes, flip_width):
    torch.manual_seed(0)
    boxes = torch.rand(num_boxes, 4, dtype=torch.float64) * 50
    boxes[:, 2:] += boxes[:, :2]
    matrix = view_matrix(0.7, 1.9, flip_width)
    expected = [_map_box_slowly(box, matrix) for box in boxes]
    expected = torch.tensor(expected, dtype=torch.float64).reshape(-1, 4)
    torch.testing.assert_close(map_boxes(boxes, matrix), expected)


@pytest.mark.parametrize("flip_width", [None, 640.0])
def test_inverse_maps_back_within_float32(flip_width):
    torch.manual_seed(0)
    boxes = torch.rand(20, 4) * 300
    boxes[:, 2:] += boxes[:, :2]
    matrix = view_matrix(800 / 427, 1199 / 640, flip_width)
    back = map_boxes(map_boxes(boxes, matrix), torch.linalg.inv(matrix))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, boxes, atol=1e-3, rtol=0)


def test_flipping_twice_changes_nothing():
    boxes = torch.tensor([[0.0, 1.0, 30.0, 9.0], [12.0, 0.0, 13.0, 2.0]])
    flip = view_matrix(1.0, 1.0, flip_width=100.0)
    assert torch.equal(map_boxes(map_boxes(boxes, flip), flip), boxes)
    assert torch.equal(flip @ flip, torch.eye(3, dtype=torch.float64))


def test_a_box_at_the_left_edge_flips_to_the_right_edge():
    flipped = map_boxes(torch.tensor([[0.0, 2.0, 10.0, 5.0]]), view_matrix(1, 1, flip_width=40))
    assert flipped.tolist() == [[30.0, 2.0, 40.0, 5.0]]


def test_input_is_not_changed():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    map_boxes(boxes, view_matrix(2.0, 2.0))
    assert boxes.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def _transfer_slowly(box, matrix, size, erased):
    """Count the pixels of a mapped box, and those that are in the view less the erased ones."""
    whole = [round(float(v)) for v in _map_box_slowly(box, matrix)]
    height, width = size
    all_of_it, left = 0, 0
    for x in range(whole[0], whole[2]):
        for y in range(whole[1], whole[3]):
            all_of_it += 1
            is_inside = 0 <= x < width and 0 <= y < height
            hiding = [a <= x < c and b <= y < d for a, b, c, d in erased.tolist()]
            left += is_inside - sum(hiding) * is_inside  # as often as it was erased
    clipped = [max(0, min(v, bound)) for v, bound in zip(whole, (width, height) * 2, strict=True)]
    has_pixels = clipped[2] - clipped[0] >= 1 and clipped[3] - clipped[1] >= 1
    # Exactly as much as must be left is decided by rounding.
    is_tie = abs(left - MIN_VISIBLE * all_of_it) < 1e-6 and has_pixels
    return clipped, None if is_tie else left > MIN_VISIBLE * all_of_it and has_pixels


def _random_boxes(count, high):
    boxes = torch.randint(0, high, (count, 4)).float()
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] // 3 + 1], dim=1)


@pytest.mark.parametrize("num_erased", [0, 1, 3])
@pytest.mark.parametrize("num_boxes", [0, 1, 60])
def test_transferred_boxes_match_pixels_counted_one_by_one(num_boxes, num_erased):
    torch.manual_seed(num_boxes + num_erased)
    size = (24, 36)
    boxes, erased = _random_boxes(num_boxes, 30), _random_boxes(num_erased, 24)
    # Whole pixels go to whole pixels: a turn by a right angle, a flip, a resize and a shift.
    turn = torch.tensor([[0.0, -2.0, 41.0], [1.0, 0.0, -9.0], [0.0, 0.0, 1.0]]).double()
    shift = torch.tensor([[2.0, 0.0, -14.0], [0.0, 1.0, 5.0], [0.0, 0.0, 1.0]]).double()
    for matrix in (turn, shift, view_matrix(1.0, 1.0, flip_width=30.0)):
        found, is_left = transfer_boxes(boxes, matrix, size, erased)
        expected = [_transfer_slowly(box, matrix, size, erased) for box in boxes]
        assert found.shape == (num_boxes, 4) and is_left.dtype == torch.bool
        for box, keep, (clipped, is_visible) in zip(found, is_left, expected, strict=True):
            if is_visible is not None:
                assert bool(keep) == is_visible
                assert not keep or box.tolist() == clipped
        assert sum(is_visible is None for _, is_visible in expected) < 5
        if num_boxes == 60:
            assert 5 < is_left.sum() < 55


@pytest.mark.parametrize(
    ("box", "is_left"),
    [
        ((-6.9, 0.0, 3.0, 10.0), True),  # just over 30 % of it is inside
        ((-7.1, 0.0, 3.0, 10.0), False),
        ((20.0, 0.0, 27.1, 10.0), True),  # erased from 22 on: 2 of 7.1 would not do
        ((20.0, 0.0, 20.9, 10.0), False),  # narrower than a pixel
        ((20.0, 0.0, 21.0, 1.0), True),
    ],
)
def test_least_that_must_be_left(box, is_left):
    erased = torch.tensor([[22.0, 3.0, 40.0, 10.0]])
    same = torch.eye(3, dtype=torch.float64)
    boxes, found = transfer_boxes(torch.tensor([box]), same, (10, 50), erased)
    assert found.tolist() == [is_left]
    assert boxes.min() >= 0


def test_turned_boxes_are_the_upright_ones_around_them():
    half = math.sqrt(0.5)
    turn = torch.tensor([[half, -half, 20.0], [half, half, 0.0], [0.0, 0.0, 1.0]]).double()
    boxes, is_left = transfer_boxes(
        torch.tensor([[0.0, 0.0, 10.0, 10.0]]), turn, (50, 50), torch.empty(0, 4)
    )
    diagonal = 10 * math.sqrt(2)
    expected = torch.tensor([[20 - diagonal / 2, 0.0, 20 + diagonal / 2, diagonal]])
    torch.testing.assert_close(boxes, expected)
    assert is_left.tolist() == [True]
