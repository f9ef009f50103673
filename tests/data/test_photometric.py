import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import RandomErasing
from torchvision.transforms.functional import adjust_hue, gaussian_blur, pil_to_tensor

from ssod.data import photometric
from ssod.data.photometric import blur, shift_hue, strong_augment


@pytest.fixture
def image(write_image):
    with Image.open(write_image("photo.png", 60, 80)) as file:
        return file.convert("RGB")


@pytest.fixture(params=["cv2", "pillow"])
def backend(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(photometric, "cv2", None)
    else:
        assert photometric.cv2 is not None, "the development dependencies include OpenCV"


def _mean_difference(one, two):
    return np.abs(np.asarray(one, dtype=float) - np.asarray(two, dtype=float)).mean()


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.0, 0.06, 0.1])
def test_hue_matches_torchvision(image, shift, backend):
    # Both libraries keep 8 bits of hue, of which torchvision shifts a whole number too.
    assert _mean_difference(shift_hue(image, shift), adjust_hue(image, shift)) < 2.0


def test_hue_of_gray_pixels_stays(image, backend):
    gray = image.convert("L").convert("RGB")
    assert _mean_difference(shift_hue(gray, 0.1), gray) == 0


def test_hue_moved_by_thirds_permutes_the_channels(backend):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert _mean_difference(shift_hue(red, 1 / 3), Image.new("RGB", (4, 4), (0, 255, 0))) < 2


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_matches_a_gaussian(image, sigma, backend):
    size = 2 * math.ceil(4 * sigma) + 1
    tensor = pil_to_tensor(image).double()
    expected = gaussian_blur(tensor, [size, size], [sigma, sigma]).permute(1, 2, 0).numpy()
    # Away from the edges, where torchvision reflects. Pillow stacks box filters.
    inner = (slice(9, -9), slice(9, -9))
    assert _mean_difference(np.asarray(blur(image, sigma))[inner], expected[inner]) < 1.0


def test_blur_keeps_a_flat_image_flat_up_to_the_edges(backend):
    flat = Image.new("RGB", (9, 9), (10, 200, 31))
    assert _mean_difference(blur(flat, 2.0), flat) == 0


def test_draws_and_pixels_are_the_same_without_opencv(image, monkeypatch):
    pixels = np.asarray(image)
    results, states = [], []
    for cv2 in (photometric.cv2, None):
        monkeypatch.setattr(photometric, "cv2", cv2)
        rng = np.random.default_rng(3)
        results.append([strong_augment(pixels, rng)[0] for _ in range(40)])
        states.append(rng.bit_generator.state)
    assert states[0] == states[1]
    differences = [_mean_difference(a, b) for a, b in zip(*results, strict=True)]
    assert max(differences) < 3.0 and np.mean(differences) < 1.0


def test_input_is_not_changed_and_seeds_repeat(image):
    pixels = np.asarray(image)
    copy = pixels.copy()
    one, two = (strong_augment(pixels, np.random.default_rng(8))[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(pixels, copy)
    assert one.shape == pixels.shape and one.dtype == np.uint8


def _colors(pixels):
    """Distinct colours, the most common one first."""
    colors, counts = np.unique(pixels.astype(int) @ [1 << 16, 1 << 8, 1], return_counts=True)
    return colors[np.argsort(-counts)]


def test_probabilities_of_jitter_grayscale_and_erasing():
    """On a flat colour, which blur does not change, the other steps can be told apart."""
    rng = np.random.default_rng(0)
    flat = np.full((16, 16, 3), (200, 90, 30), np.uint8)
    results = [_colors(strong_augment(flat, rng)[0]) for _ in range(1500)]
    main = np.array([colors[0] for colors in results])
    gray = (main >> 16 == main >> 8 & 255) & (main >> 16 == main & 255)
    # Four standard deviations of the largest share below are 0.04.
    assert gray.mean() == pytest.approx(0.2, abs=0.04)
    assert (main == _colors(flat)[0]).mean() == pytest.approx(0.2 * 0.8, abs=0.04)
    not_erased = np.mean([len(colors) == 1 for colors in results])
    assert not_erased == pytest.approx(0.3 * 0.5 * 0.7, abs=0.035)


def test_probability_of_blur():
    """Two flat halves have more than two colours after a blur, or after an erasing."""
    rng = np.random.default_rng(0)
    halves = np.full((16, 16, 3), (200, 90, 30), np.uint8)
    halves[8:] = (40, 80, 160)
    sharp = np.mean([len(_colors(strong_augment(halves, rng)[0])) == 2 for _ in range(1500)])
    # Below a sigma of 0.3, a tenth of the blurs, nothing can be seen of it.
    assert sharp == pytest.approx(0.105 * (0.5 + 0.5 * 0.1), abs=0.02)


@pytest.mark.parametrize(("prob", "area", "ratio"), photometric._ERASURES)
def test_erased_area_is_distributed_as_in_torchvision(prob, area, ratio):
    height, width = 60, 90
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    reference = pil_to_tensor(Image.new("RGB", (width, height)))
    for _ in range(1500):
        pixels = np.zeros((height, width, 3), np.uint8)
        photometric._erase(pixels, area, ratio, rng)
        changed = pixels.any(axis=2)
        ours.append((changed.any(axis=1).sum(), changed.any(axis=0).sum()))
        _, _, h, w, _ = RandomErasing.get_params(reference, area, ratio)
        theirs.append((h, w))
    # Torchvision gives back the whole image where no try fits.
    theirs = [(0, 0) if hw == (height, width) else hw for hw in theirs]
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    error = np.sqrt(ours.var(axis=0) + theirs.var(axis=0)) / math.sqrt(len(ours))
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
    assert ours.std(axis=0) == pytest.approx(theirs.std(axis=0), rel=0.15)


def test_erased_pixels_are_uniform_noise():
    rng = np.random.default_rng(0)
    levels = []
    for _ in range(30):
        pixels = np.zeros((60, 60, 3), np.uint8)
        photometric._erase(pixels, (0.2, 0.2), (1.0, 1.0), rng)
        levels.append(pixels[pixels.any(axis=2)])
    counts = np.bincount(np.concatenate(levels).ravel(), minlength=256)
    assert counts.min() > 0.7 * counts.mean() and counts.max() < 1.3 * counts.mean()


def test_erased_rectangles_are_told_exactly():
    """On one flat colour noise is what has another one; nearly every pixel of it."""
    rng = np.random.default_rng(0)
    flat = np.full((60, 80, 3), (200, 90, 30), np.uint8)
    counts = []
    for _ in range(60):
        pixels, erased = strong_augment(flat, rng)
        is_told = np.zeros((60, 80), bool)
        for x1, y1, x2, y2 in erased:
            assert 0 <= x1 <= x2 <= 80 and 0 <= y1 <= y2 <= 60
            is_told[y1:y2, x1:x2] = True
        colors = _colors(pixels)
        has_noise = (pixels.astype(int) @ [1 << 16, 1 << 8, 1]) != colors[0]
        assert not (has_noise & ~is_told).any()
        assert (has_noise == is_told).mean() > 0.999
        counts.append(len(erased))
    assert set(counts) == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3)])
def test_tiny_images(size):
    rng = np.random.default_rng(0)
    for _ in range(30):
        assert strong_augment(np.zeros((*size, 3), np.uint8), rng)[0].shape == (*size, 3)
