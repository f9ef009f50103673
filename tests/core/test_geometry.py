import pytest
import torch

from ssod.core.geometry import map_boxes, view_matrix


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
