import numpy as np
import pytest
import torch
from PIL import Image

from ssod.core.geometry import map_boxes
from ssod.data.images import read_image
from ssod.data.photometric import strong_augment
from ssod.data.views import make_test_view, make_views, resize_shortest_edge


def _views(image, boxes=None, seed=0, min_sizes=(30,), max_size=60, flip=True):
    boxes = np.empty((0, 4), np.float32) if boxes is None else boxes
    rng = np.random.default_rng(seed)
    return make_views(image, boxes, rng=rng, min_sizes=min_sizes, max_size=max_size, flip=flip)


@pytest.fixture
def image(write_image):
    return read_image(write_image("photo.png", 24, 32))


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (100, 100), (33, 1000), (427, 640)])
@pytest.mark.parametrize(("min_size", "max_size"), [(800, 1333), (96, 128), (33, 2000)])
def test_size_rule(shape, min_size, max_size):
    height, width = resize_shortest_edge(*shape, min_size, max_size)
    assert min(height, width) <= min_size and max(height, width) <= max_size
    assert min(height, width) == min_size or max(height, width) == max_size
    scale = min(min_size / min(shape), max_size / max(shape))
    assert abs(height - shape[0] * scale) <= 0.5 and abs(width - shape[1] * scale) <= 0.5


def test_extreme_shapes_keep_a_pixel():
    assert resize_shortest_edge(1, 5000, 800, 1333) == (1, 1333)


def test_boxes_follow_a_bright_spot():
    """The box of a rectangle drawn in the image bounds the rectangle in both orientations."""
    flipped = 0
    for seed in range(20):
        image = np.zeros((60, 100, 3), np.uint8)
        image[12:36, 8:40] = 255
        weak, strong, boxes = _views(
            image, np.array([[8, 12, 40, 36]], np.float32), seed, (30, 90, 120), 160
        )
        assert weak.shape == strong.shape and weak.dtype == strong.dtype == torch.uint8
        inside = weak[0] >= 128
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        spot = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        torch.testing.assert_close(boxes[0], torch.stack(spot).float(), atol=1.0, rtol=0)
        flipped += int(columns.min() > 0.5 * weak.shape[2])
    assert 4 <= flipped <= 16


def test_flipped_view_is_the_mirrored_other(image):
    views = {seed: _views(image, np.array([[1, 2, 9, 20]], np.float32), seed) for seed in range(8)}
    plain = _views(image, np.array([[1, 2, 9, 20]], np.float32), flip=False)
    mirrored = 0
    for weak, _, boxes in views.values():
        if torch.equal(weak, plain[0]):
            assert torch.equal(boxes, plain[2])
        else:
            mirrored += 1
            assert torch.equal(weak.flip(2), plain[0])
            back = boxes.clone()
            back[:, [0, 2]] = weak.shape[2] - boxes[:, [2, 0]]
            torch.testing.assert_close(back, plain[2])
    assert 0 < mirrored < 8


def test_strong_view_has_the_pixels_of_the_recipe(image):
    """Without resizing and flipping, the strong view is the recipe on the original."""
    weak, strong, _ = _views(image, min_sizes=(24,), flip=False)
    assert torch.equal(weak, torch.from_numpy(image).permute(2, 0, 1))
    rng = np.random.default_rng(0)
    rng.integers(1)  # the choice of the size
    assert torch.equal(strong, torch.from_numpy(strong_augment(image, rng)).permute(2, 0, 1))


def test_resizing_is_bilinear_with_antialiasing(image):
    view, _ = make_test_view(image, 13, 100)
    expected = np.array(Image.fromarray(image).resize((17, 13), Image.Resampling.BILINEAR))
    assert torch.equal(view, torch.from_numpy(expected).permute(2, 0, 1))


def test_every_size_is_chosen(image):
    sizes = {min(_views(image, seed=s, min_sizes=(20, 25, 30))[0].shape[1:]) for s in range(30)}
    assert sizes == {20, 25, 30}


def test_images_without_boxes(image):
    assert _views(image)[2].shape == (0, 4)


@pytest.mark.parametrize("min_size", [24, 40, 17])
def test_test_view_matrix_maps_the_whole_image_to_the_whole_view(image, min_size):
    view, matrix = make_test_view(image, min_size, 50)
    corners = map_boxes(torch.tensor([[0.0, 0.0, 32.0, 24.0]]), matrix)
    assert corners.tolist() == [[0.0, 0.0, view.shape[2], view.shape[1]]]


def test_input_is_not_changed(image):
    before = image.copy()
    for seed in range(5):
        for view in _views(image, seed=seed, min_sizes=(24,))[:2]:
            view.zero_()
    np.testing.assert_array_equal(image, before)
