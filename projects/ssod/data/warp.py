"""Rotation, shear and translation of strong views (Soft Teacher, MixPL)."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_ANGLE = 30.0  # degrees, of rotations and shears
MAX_SHIFT = 0.1  # share of a side
FILL = 128  # of what was outside the image, in each channel


def random_warp(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """
    Draw a rotation, a shear along one axis, or a translation along both; each is as likely.

    Angles and shares of the sides are uniform. Differs from the published code: rotations and
    shears leave the centre where it is, where those of mmdetection shear from a corner, which
    moves half of the image out of a view as wide as it is high.

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

    Args:
        image: (H, W, 3) uint8 RGB.
        matrix: (3, 3) from its pixels to those of the result; pixel i covers [i, i + 1).
    """
    # Pillow wants where the pixels are from, and has their centers at a half as well.
    back = torch.linalg.inv(matrix)[:2].flatten().tolist()
    warped = Image.fromarray(image).transform(
        (image.shape[1], image.shape[0]),
        Image.Transform.AFFINE,
        back,
        Image.Resampling.BILINEAR,
        fillcolor=(FILL, FILL, FILL),
    )
    return np.asarray(warped)


def _affine(xx: float, xy: float, yx: float, yy: float, x: float, y: float) -> Tensor:
    return torch.tensor([[xx, xy, x], [yx, yy, y], [0.0, 0.0, 1.0]], dtype=torch.float64)
