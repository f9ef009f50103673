"""
The strong augmentation of Unbiased Teacher (https://arxiv.org/abs/2102.09480), without geometry.

Images are (H, W, 3) uint8 RGB arrays. OpenCV, where installed, computes the hue shift and the
blur; without it Pillow does, with nearly the same pixels. The random draws are the same.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

try:
    import cv2
except ImportError:
    cv2 = None

_JITTER_PROB = 0.8
_JITTER_STRENGTH = 0.4  # brightness, contrast and saturation factors in [0.6, 1.4]
_HUE_STRENGTH = 0.1  # share of the colour circle
_GRAYSCALE_PROB = 0.2
_BLUR_PROB = 0.5
_BLUR_SIGMA = (0.1, 2.0)  # pixels
# Probability, range of the erased share of the image, range of height / width.
_ERASURES = (
    (0.7, (0.05, 0.2), (0.3, 3.3)),
    (0.5, (0.02, 0.2), (0.1, 6.0)),
    (0.3, (0.02, 0.2), (0.05, 8.0)),
)
_ERASE_TRIES = 10


def strong_augment(
    image: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """
    Apply colour jitter, grayscale, blur and three random erasings to a copy of the image.

    Probabilities, ranges and order are those of the published code. One deviation: erased
    rectangles are filled with uniform noise. The published code asks for Gaussian noise, but its
    conversion to bytes wraps around, so what it trained with was close to uniform.

    Args:
        image: (H, W, 3) uint8 RGB.
        rng: source of every random decision; OpenCV or not makes no difference to the draws.

    Returns:
        (H, W, 3) uint8 RGB, and the at most three erased rectangles, XYXY pixels; they may overlap.
    """
    result = Image.fromarray(image)
    if rng.random() < _JITTER_PROB:
        result = _color_jitter(result, rng)
    if rng.random() < _GRAYSCALE_PROB:
        result = result.convert("L").convert("RGB")
    if rng.random() < _BLUR_PROB:
        result = blur(result, rng.uniform(*_BLUR_SIGMA))
    pixels = np.array(result)
    erased = []
    for prob, area, ratio in _ERASURES:
        if rng.random() < prob:
            erased += _erase(pixels, area, ratio, rng)
    return pixels, erased


def _color_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue in random order."""
    low, high = 1 - _JITTER_STRENGTH, 1 + _JITTER_STRENGTH
    brightness, contrast, saturation = rng.uniform(low, high, size=3)
    hue = rng.uniform(-_HUE_STRENGTH, _HUE_STRENGTH)
    for step in rng.permutation(4):
        if step == 0:
            image = ImageEnhance.Brightness(image).enhance(brightness)
        elif step == 1:
            image = ImageEnhance.Contrast(image).enhance(contrast)
        elif step == 2:
            image = ImageEnhance.Color(image).enhance(saturation)
        else:
            image = shift_hue(image, hue)
    return image


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Rotate the hue of an RGB image by `shift` turns of the colour circle."""
    steps = round(shift * 256) % 256  # both libraries keep hue in 8 bits here
    if cv2 is None:
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + steps) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    hsv = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(steps)  # wraps around, as a circle does
    return Image.fromarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur an RGB image by a Gaussian of standard deviation `sigma` pixels, edges repeated."""
    if cv2 is None:
        return image.filter(ImageFilter.GaussianBlur(sigma))
    blurred = cv2.GaussianBlur(np.asarray(image), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    return Image.fromarray(blurred)


def _erase(
    pixels: np.ndarray,
    area_range: tuple[float, float],
    ratio_range: tuple[float, float],
    rng: np.random.Generator,
) -> list[tuple[int, int, int, int]]:
    """Fill a random rectangle with noise, in place; none if no try fits into the image."""
    height, width = pixels.shape[:2]
    for _ in range(_ERASE_TRIES):
        area = rng.uniform(*area_range) * height * width
        ratio = math.exp(rng.uniform(*np.log(ratio_range)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            pixels[top : top + h, left : left + w] = rng.integers(
                256, size=(h, w, 3), dtype=np.uint8
            )
            return [(left, top, left + w, top + h)]
    return []
