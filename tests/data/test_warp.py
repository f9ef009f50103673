import math

import numpy as np
import pytest
import torch
from PIL import Image

from ssod.data import photometric
from ssod.data.warp import FILL, MAX_ANGLE, MAX_SHIFT, random_warp, warp_image

HEIGHT, WIDTH = 60, 90


@pytest.fixture(params=["cv2", "pillow"])
def backend(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(photometric, "cv2", None)
    else:
        assert photometric.cv2 is not None, "the development dependencies include OpenCV"


def _kind(matrix):
    """The kind of a warp, and its angle in degrees or its shares of the sides."""
    (a, b, x), (c, d, y), last = matrix.tolist()
    assert last == [0, 0, 1]
    if (a, b, c, d) == (1, 0, 0, 1):
        return "translate", (x / WIDTH, y / HEIGHT)
    if (a, d, c) == (1, 1, 0):
        return "shear x", math.degrees(math.atan(b))
    if (a, d, b) == (1, 1, 0):
        return "shear y", math.degrees(math.atan(c))
    assert a == d == pytest.approx(math.sqrt(1 - c * c)) and b == -c
    return "rotate", math.degrees(math.asin(c))


def test_kinds_and_ranges():
    rng = np.random.default_rng(0)
    found = [_kind(random_warp(HEIGHT, WIDTH, rng)) for _ in range(3000)]
    values = {kind: np.array([v for k, v in found if k == kind]) for kind, _ in found}
    shares = {kind: len(v) / 3000 for kind, v in values.items()}
    expected = {"translate": 1 / 3, "rotate": 1 / 3, "shear x": 1 / 6, "shear y": 1 / 6}
    assert shares == pytest.approx(expected, abs=0.035)  # four standard deviations
    for kind, value in values.items():
        bound = MAX_SHIFT if kind == "translate" else MAX_ANGLE
        assert np.abs(value).max() <= bound and np.abs(value).max() > 0.98 * bound
        # Uniform: the quarters are as likely.
        counts = np.histogram(value, bins=4, range=(-bound, bound))[0] / value.size
        assert counts == pytest.approx(0.25, abs=0.08)


def test_the_center_stays_unless_it_is_moved():
    rng = np.random.default_rng(0)
    center = torch.tensor([WIDTH / 2, HEIGHT / 2, 1.0], dtype=torch.float64)
    for _ in range(50):
        matrix = random_warp(HEIGHT, WIDTH, rng)
        if _kind(matrix)[0] != "translate":
            torch.testing.assert_close(matrix @ center, center)


def _warp_slowly(image, matrix):
    """Bilinear at the source of each pixel's centre, by loops; outside is the fill."""
    height, width = image.shape[:2]
    back = torch.linalg.inv(matrix).numpy()
    result = np.full(image.shape, float(FILL))
    for row in range(height):
        for column in range(width):
            x, y, _ = back @ [column + 0.5, row + 0.5, 1.0]
            if not (0 <= x < width and 0 <= y < height):
                continue
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            value = 0.0
            for r, v in ((top, 1 - (y - 0.5 - top)), (top + 1, y - 0.5 - top)):
                for c, u in ((left, 1 - (x - 0.5 - left)), (left + 1, x - 0.5 - left)):
                    value = value + u * v * image[min(max(r, 0), height - 1)][
                        min(max(c, 0), width - 1)
                    ].astype(float)
            result[row, column] = value
    return result


def test_pixels_match_a_slow_reference(backend):
    y, x = np.mgrid[:20, :30]
    image = np.stack([8 * x, 12 * y, 4 * x + 6 * y], axis=2).astype(np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(8):
        matrix = random_warp(20, 30, rng)
        difference = np.abs(warp_image(image, matrix) - _warp_slowly(image, matrix)).max(2)
        # A shift by a tenth of a pixel changes 1.2 levels. At the image's edges OpenCV mixes it
        # with the fill, and a source on the very edge may be on either side of it.
        assert (difference > 1.01).mean() < (0.01 if photometric.cv2 is None else 0.15)
        assert np.median(difference) < 1.01


def test_nothing_moved_changes_nothing(write_image, backend):
    with Image.open(write_image("photo.png", 20, 30)) as file:
        image = np.asarray(file.convert("RGB"))
    np.testing.assert_array_equal(warp_image(image, torch.eye(3, dtype=torch.float64)), image)


def test_tiny_images(backend):
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert warp_image(np.zeros((1, 2, 3), np.uint8), random_warp(1, 2, rng)).shape == (1, 2, 3)
