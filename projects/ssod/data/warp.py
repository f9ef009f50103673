"""Rotation, shear and translation of strong views (Soft Teacher, MixPL)."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssod.data import photometric

MAX_ANGLE = 30.0  # degrees, of rotations and shears
MAX_SHIFT = 0.1  # share of a side
FILL = 128  # of what was outside the image, in each channel


def random_warp(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """
    Draw a rotation, a shear along one axis, or a translation along both; each is as likely.

    Angles and shares of the sides are uniform. Differs from the published code: rotations and
    shears leave the centre where it is. mmdetection shears from a corner, which moves twice as much
    of the image out of the view.

    Args:
        height: of the view, in pixels; so is the width.
        width: likewise.
        rng: source of the draws.

    Returns:
        (3, 3) float64 from pixels of the view to those of the warped one.
    """
    kind = rng.integers(3)
    if kind == 2:
        x, y = rng.uniform(-MAX_SHIFT, MAX_SHIFT, size=2) * (width, height)
        return _affine(1.0, 0.0, 0.0, 1.0, x, y)
    angle = math.radians(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    if kind == 0:
        linear = (math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))
    elif rng.random() < 0.5:
        linear = (1.0, math.tan(angle), 0.0, 1.0)
    else:
        linear = (1.0, 0.0, math.tan(angle), 1.0)
    to_center = _affine(1.0, 0.0, 0.0, 1.0, -width / 2, -height / 2)
    return torch.linalg.inv(to_center) @ _affine(*linear, 0.0, 0.0) @ to_center


def warp_image(image: np.ndarray, matrix: Tensor) -> np.ndarray:
    """
    Return the warped image at its size, bilinear, with `FILL` around it.

    OpenCV computes it where installed, in a fifth of Pillow's time, and otherwise Pillow.

    Args:
        image: (H, W, 3) uint8 RGB.
        matrix: (3, 3) from its pixels to those of the result; pixel i covers [i, i + 1).
    """
    size, fill = (image.shape[1], image.shape[0]), (FILL, FILL, FILL)
    cv2 = photometric.cv2
    if cv2 is not None:
        half = _affine(1.0, 0.0, 0.0, 1.0, 0.5, 0.5)  # its pixel i is at i, not i + 1 / 2
        there = (torch.linalg.inv(half) @ matrix @ half)[:2].numpy()
        return cv2.warpAffine(image, there, size, flags=cv2.INTER_LINEAR, borderValue=fill)
    back = torch.linalg.inv(matrix)[:2].flatten().tolist()  # Pillow wants where pixels are from
    picture = Image.fromarray(image)
    bilinear = Image.Resampling.BILINEAR
    return np.asarray(
        picture.transform(size, Image.Transform.AFFINE, back, bilinear, fillcolor=fill)
    )


def _affine(xx: float, xy: float, yx: float, yy: float, x: float, y: float) -> Tensor:
    return torch.tensor([[xx, xy, x], [yx, yy, y], [0.0, 0.0, 1.0]], dtype=torch.float64)
