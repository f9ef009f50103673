"""The weak and the strong view of an image, and the view it is tested in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssod.core.geometry import map_boxes, view_matrix
from ssod.data.photometric import strong_augment


def resize_shortest_edge(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """
    Return the (height, width) whose shorter side is `min_size`, rounded as Detectron2 does.

    Both sides are reduced in proportion where the longer one would exceed `max_size`.
    """
    scale = min_size / min(height, width)
    # Not `scale * min(height, width)`, which can round to another pixel where max_size applies.
    new_height, new_width = float(min_size), float(min_size)
    if height < width:
        new_width = scale * width
    else:
        new_height = scale * height
    longer = max(new_height, new_width)
    if longer > max_size:
        new_height *= max_size / longer
        new_width *= max_size / longer
    # Detectron2 has no lower bound and fails on images more than 2 * max_size times as long.
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def make_views(
    image: np.ndarray,
    boxes: np.ndarray,
    *,
    rng: np.random.Generator,
    min_sizes: Sequence[int],
    max_size: int,
    flip: bool,
    with_strong: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """
    Make two views of one geometry: resized and maybe flipped, then the same with strong colours.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (M, 4) float32 XYXY pixels of `image`, M = 0 allowed.
        rng: source of every random decision.
        min_sizes: the shorter side of the views is one of these, in pixels.
        max_size: bound on the longer side.
        flip: whether half of the images are flipped horizontally.
        with_strong: whether the strong view is wanted.

    Returns:
        weak and strong view, (3, h, w) uint8, and the (M, 4) boxes in pixels of both. The strong
        one is None if it is not wanted.
    """
    min_size = min_sizes[rng.integers(len(min_sizes))]
    weak, matrix = _resize(image, min_size, max_size)
    if flip and rng.random() < 0.5:
        weak = np.ascontiguousarray(weak[:, ::-1])
        matrix = view_matrix(1.0, 1.0, flip_width=weak.shape[1]) @ matrix
    strong = _to_tensor(strong_augment(weak, rng)) if with_strong else None
    return _to_tensor(weak), strong, map_boxes(torch.from_numpy(boxes), matrix)


def strong_view(weak: Tensor, rng: np.random.Generator) -> Tensor:
    """Return another strong view of the (3, h, w) uint8 pixels of a weak one."""
    return _to_tensor(strong_augment(weak.permute(1, 2, 0).numpy(), rng))


def make_test_view(image: np.ndarray, min_size: int, max_size: int) -> tuple[Tensor, Tensor]:
    """
    Resize an image (H, W, 3) uint8 RGB for testing.

    Returns:
        (3, h, w) uint8, and the (3, 3) float64 matrix from pixels of the image to the view.
    """
    view, matrix = _resize(image, min_size, max_size)
    return _to_tensor(view), matrix


def _resize(image: np.ndarray, min_size: int, max_size: int) -> tuple[np.ndarray, Tensor]:
    height, width = image.shape[:2]
    new_height, new_width = resize_shortest_edge(height, width, min_size, max_size)
    if (new_height, new_width) != (height, width):
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    return image, view_matrix(new_width / width, new_height / height)


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())
