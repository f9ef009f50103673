import numpy as np
import pytest
import torch
from PIL import Image

from ssod.core.geometry import map_boxes
from ssod.data.images import read_image
from ssod.data.photometric import strong_augment
from ssod.data.views import make_test_view, make_views, resize_shortest_edge


def _pair(image, boxes=None, seed=0, min_sizes=(30,), max_size=60, flip=True, **options):
    boxes = np.empty((0, 4), np.float32) if boxes is None else boxes
    options |= {"min_sizes": min_sizes, "max_size": max_size, "flip": flip}
    return make_views(image, boxes, rng=np.random.default_rng(seed), **options)


def _views(*args, **kwargs):
    pair = _pair(*args, **kwargs)
    return pair.weak, pair.strong, pair.boxes


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
    assert torch.equal(strong, torch.from_numpy(strong_augment(image, rng)[0]).permute(2, 0, 1))


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


OWN = {"independent": True, "warp": True}


@pytest.mark.parametrize("flip", [True, False])
def test_without_a_geometry_of_their_own_views_are_what_they_always_were(image, flip):
    """Against the draws and steps written out; nothing else is drawn."""
    boxes = np.array([[1, 2, 9, 20]], np.float32)
    for seed in range(10):
        rng, given = np.random.default_rng(seed), np.random.default_rng(seed)
        size = (20, 30, 40)[rng.integers(3)]
        width = round(size / 24 * 32 + 1e-6)
        resized = Image.fromarray(image).resize((width, size), Image.Resampling.BILINEAR)
        expected = np.asarray(resized)
        moved = boxes * np.float64([width / 32, size / 24] * 2)
        if flip and rng.random() < 0.5:
            expected, moved = expected[:, ::-1], moved[:, [2, 1, 0, 3]]
            moved[:, [0, 2]] = width - moved[:, [0, 2]]
        strong, _ = strong_augment(np.ascontiguousarray(expected), rng)
        sizes = {"min_sizes": (20, 30, 40), "max_size": 60, "flip": flip}
        pair = make_views(image, boxes, rng=given, **sizes)
        np.testing.assert_array_equal(pair.weak.permute(1, 2, 0), expected)
        np.testing.assert_array_equal(pair.strong.permute(1, 2, 0), strong)
        np.testing.assert_allclose(pair.boxes, moved, rtol=1e-6)
        assert given.bit_generator.state == rng.bit_generator.state
        assert pair.to_strong is None and pair.erased.shape == (0, 4)


@pytest.mark.parametrize("option", OWN)
def test_a_geometry_of_its_own_changes_no_draw_of_the_weak_view(image, option):
    for seed in range(6):
        plain, own = (
            _pair(image, seed=seed, min_sizes=(20, 28, 36), **options)
            for options in ({}, {option: True})
        )
        assert torch.equal(own.weak, plain.weak) and torch.equal(own.boxes, plain.boxes)
        again = _pair(image, seed=seed, min_sizes=(20, 28, 36), **{option: True})
        assert torch.equal(own.strong, again.strong)
        assert torch.equal(own.to_strong, again.to_strong)


def test_without_a_strong_view_there_is_no_matrix(image):
    pair = _pair(image, with_strong=False, **OWN)
    assert pair.strong is pair.to_strong is None and pair.erased.shape == (0, 4)


def _center(view):
    """Centre of mass of a view's red light, in continuous pixels; black and gray have none."""
    light = view[0].double() - view[2].double()
    height, width = light.shape
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    return torch.stack([(light.sum(0) * x).sum(), (light.sum(1) * y).sum()]) / light.sum()


@pytest.mark.parametrize("options", [{"independent": True}, {"warp": True}, OWN], ids=str)
def test_spots_of_the_weak_view_are_where_the_matrix_takes_them(options, monkeypatch):
    """Centres of mass, which interpolation keeps, of red squares; flipped or not."""
    monkeypatch.setattr("ssod.data.views.strong_augment", lambda image, rng: (image, []))
    seen, mirrored = 0, set()
    for seed in range(60):
        for x, y in ((20, 20), (60, 24), (30, 50)):
            image = np.zeros((80, 100, 3), np.uint8)
            image[y : y + 6, x : x + 6, 0] = 255
            box = np.array([[x, y, x + 6, y + 6]], np.float32)
            pair = _pair(image, box, seed, (60, 80, 120), 200, **options)
            mapped = map_boxes(pair.boxes, pair.to_strong)[0]
            height, width = pair.strong.shape[1:]
            if (mapped[:2] > 5).all() and mapped[2] < width - 5 and mapped[3] < height - 5:
                found = _center(pair.strong)
                middle = (mapped[:2] + mapped[2:]) / 2
                torch.testing.assert_close(found, middle.double(), atol=0.1, rtol=0)
                weak = torch.cat([_center(pair.weak), torch.ones(1)])
                moved = (pair.to_strong @ weak)[:2]
                torch.testing.assert_close(moved, found, atol=0.1, rtol=0)
                seen += 1
        mirrored.add(bool(torch.linalg.det(pair.to_strong) < 0))
        if not options.get("independent"):
            assert pair.strong.shape == pair.weak.shape
    assert seen > 100 and mirrored == ({True, False} if options.get("independent") else {False})


def test_boxes_of_the_strong_view_bound_a_bright_rectangle(monkeypatch):
    monkeypatch.setattr("ssod.data.views.strong_augment", lambda image, rng: (image, []))
    for seed in range(30):
        image = np.zeros((80, 100, 3), np.uint8)
        image[30:50, 40:64, 0] = 255
        box = np.array([[40, 30, 64, 50]], np.float32)
        pair = _pair(image, box, seed, (60, 100), 200, **OWN)
        inside = (pair.strong[0] >= 64) & (pair.strong[2] == 0)  # a tip has less than a whole pixel
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        spot = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        mapped = map_boxes(pair.boxes, pair.to_strong)[0]
        torch.testing.assert_close(mapped, spot.float(), atol=1.5, rtol=0)


def test_what_is_erased_is_told_in_pixels_of_the_strong_view(image):
    sizes = {"min_sizes": (20, 60), "max_size": 200}
    counts = set()
    for seed in range(20):
        pair = _pair(image, seed=seed, **sizes, **OWN)
        height, width = pair.strong.shape[1:]
        assert pair.erased.dtype == torch.float32
        for x1, y1, x2, y2 in pair.erased.int().tolist():
            assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
            patch = pair.strong[:, y1:y2, x1:x2].double()
            if patch.numel() > 300:  # noise, of which the standard deviation is known
                assert patch.std() == pytest.approx(256 / 12**0.5, rel=0.15)
        counts.add(len(pair.erased))
    assert len(counts) > 2


def test_sizes_of_a_range(image):
    sizes = [
        min(_views(image, seed=s, min_sizes=(20, 23), size_range=True)[0].shape[1:])
        for s in range(200)
    ]
    counts = np.bincount(sizes, minlength=24)
    assert counts[:20].sum() == 0 and counts.sum() == 200
    assert (np.abs(counts[20:] - 50) < 25).all()  # four standard deviations


def test_views_that_are_independent_differ_in_size_and_flip(image):
    pairs = [_pair(image, seed=s, min_sizes=(20, 40), independent=True) for s in range(60)]
    kinds = {
        (min(p.weak.shape[1:]), min(p.strong.shape[1:]), bool(torch.linalg.det(p.to_strong) < 0))
        for p in pairs
    }
    assert len(kinds) == 8
    for pair in pairs:
        corners = torch.tensor([[0.0, 0.0, pair.weak.shape[2], pair.weak.shape[1]]])
        expected = torch.tensor([[0.0, 0.0, pair.strong.shape[2], pair.strong.shape[1]]])
        torch.testing.assert_close(map_boxes(corners, pair.to_strong), expected)
