"""The weak and the strong view of an image, and the view it is tested in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor

from ssod.core.geometry import map_boxes, view_matrix
from ssod.data.photometric import strong_augment
from ssod.data.warp import random_warp, warp_image
from ssod.errors import InputError


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


def check_view_keys(keys: CfgNode) -> None:
    """
    Check those of the group `INPUT` of a config that views are made by.

    Raises:
        InputError: for a value of `RANDOM_FLIP` other than "horizontal" and "none", of
            `MIN_SIZE_TRAIN_SAMPLING` other than "choice" and "range", and for sizes below 1 or that
            are no range.
    """
    if keys.RANDOM_FLIP not in ("horizontal", "none"):
        raise InputError(
            f'INPUT.RANDOM_FLIP must be "horizontal" or "none", got {keys.RANDOM_FLIP!r}'
        )
    sampling, sizes = keys.MIN_SIZE_TRAIN_SAMPLING, tuple(keys.MIN_SIZE_TRAIN)
    if sampling not in ("choice", "range"):
        raise InputError(
            f'INPUT.MIN_SIZE_TRAIN_SAMPLING must be "choice" or "range", got {sampling!r}'
        )
    if any(size < 1 for size in sizes):
        raise InputError(f"INPUT.MIN_SIZE_TRAIN needs sizes of at least 1 pixel, got {sizes}")
    if sampling == "range" and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        raise InputError(
            "INPUT.MIN_SIZE_TRAIN must be the smallest and the largest size for "
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING range, got {sizes}"
        )


@dataclass
class ViewPair:
    """
    The weak and the strong view of one image.

    Attributes:
        weak: (3, h, w) uint8.
        strong: (3, h', w') uint8; the same size if `to_strong` is None. None if it is not wanted.
        boxes: (M, 4) pixels of the weak view, and of the strong one if `to_strong` is None.
        to_strong: (3, 3) float64 from pixels of the weak to those of the strong view, None if they
            are the same.
        erased: (E, 4) float32 rectangles of the strong view that hold noise; none if `to_strong` is
            None, where boxes are learned whatever hides them (Unbiased Teacher).
    """

    weak: Tensor
    strong: Tensor | None
    boxes: Tensor
    to_strong: Tensor | None
    erased: Tensor


def make_views(
    image: np.ndarray,
    boxes: np.ndarray,
    *,
    rng: np.random.Generator,
    min_sizes: Sequence[int],
    max_size: int,
    flip: bool,
    size_range: bool = False,
    independent: bool = False,
    warp: bool = False,
    with_strong: bool = True,
) -> ViewPair:
    """
    Make a weak view, resized and maybe flipped, and a strong one: warped, then with strong colours.

    `independent` and `warp` change no draw of the weak view, nor of the colours.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (M, 4) float32 XYXY pixels of `image`, M = 0 allowed.
        rng: source of every random decision.
        min_sizes: the shorter side of the views is one of these, in pixels.
        max_size: bound on the longer side.
        flip: whether half of the images are flipped horizontally.
        size_range: whether the shorter side is instead any from the first to the second of the two
            sizes, each as likely.
        independent: whether the strong view has a size and a flip of its own.
        warp: whether the strong view is rotated, sheared or moved, see `random_warp`.
        with_strong: whether the strong view is wanted.
    """
    pixels, matrix = _random_view(image, rng, min_sizes, max_size, flip, size_range)
    weak, moved = _to_tensor(pixels), map_boxes(torch.from_numpy(boxes), matrix)
    if not with_strong:
        return ViewPair(weak, None, moved, None, _rectangles([]))
    to_strong = None
    if independent or warp:
        geometry = rng.spawn(1)[0]  # which draws nothing from the generator itself
        strong_matrix = matrix
        if independent:
            pixels, strong_matrix = _random_view(
                image, geometry, min_sizes, max_size, flip, size_range
            )
        if warp:
            warp_matrix = random_warp(*pixels.shape[:2], geometry)
            pixels, strong_matrix = warp_image(pixels, warp_matrix), warp_matrix @ strong_matrix
        to_strong = strong_matrix @ torch.linalg.inv(matrix)
    strong, erased = strong_augment(pixels, rng)
    hidden = _rectangles([] if to_strong is None else erased)
    return ViewPair(weak, _to_tensor(strong), moved, to_strong, hidden)


def strong_view(weak: Tensor, rng: np.random.Generator) -> Tensor:
    """Return another strong view of the (3, h, w) uint8 pixels of a weak one."""
    return _to_tensor(strong_augment(weak.permute(1, 2, 0).numpy(), rng)[0])


def make_test_view(image: np.ndarray, min_size: int, max_size: int) -> tuple[Tensor, Tensor]:
    """
    Resize an image (H, W, 3) uint8 RGB for testing.

    Returns:
        (3, h, w) uint8, and the (3, 3) float64 matrix from pixels of the image to the view.
    """
    view, matrix = _resize(image, min_size, max_size)
    return _to_tensor(view), matrix


def _random_view(
    image: np.ndarray,
    rng: np.random.Generator,
    min_sizes: Sequence[int],
    max_size: int,
    flip: bool,
    size_range: bool,
) -> tuple[np.ndarray, Tensor]:
    """Resize and maybe flip; also returns the matrix from pixels of the image to the view."""
    if size_range:
        min_size = int(rng.integers(min_sizes[0], min_sizes[1] + 1))
    else:
        min_size = min_sizes[rng.integers(len(min_sizes))]
    view, matrix = _resize(image, min_size, max_size)
    if flip and rng.random() < 0.5:
        view = np.ascontiguousarray(view[:, ::-1])
        matrix = view_matrix(1.0, 1.0, flip_width=view.shape[1]) @ matrix
    return view, matrix


def _resize(image: np.ndarray, min_size: int, max_size: int) -> tuple[np.ndarray, Tensor]:
    height, width = image.shape[:2]
    new_height, new_width = resize_shortest_edge(height, width, min_size, max_size)
    if (new_height, new_width) != (height, width):
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    return image, view_matrix(new_width / width, new_height / height)


def _rectangles(boxes: Sequence[tuple[int, int, int, int]]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())
