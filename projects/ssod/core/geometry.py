"""
Where the pixels of an image go when it is resized, flipped or warped, as 3 x 3 matrices.

A matrix maps (x, y, 1) of one image, say the original, to another, say a view of it; the inverse
maps back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_area, clip_boxes_to_image

MIN_VISIBLE = 0.3  # MixPL drops boxes of which erasing hides 70 %


def view_matrix(scale_x: float, scale_y: float, flip_width: float | None = None) -> Tensor:
    """
    Return the (3, 3) float64 matrix of a resize and, after it, a horizontal flip.

    Args:
        scale_x: width of the view divided by the width of the original.
        scale_y: the same for the heights.
        flip_width: width of the view in pixels if it is flipped, None if not.
    """
    if flip_width is None:
        row_x = [scale_x, 0.0, 0.0]
    else:
        row_x = [-scale_x, 0.0, flip_width]
    return torch.tensor([row_x, [0.0, scale_y, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def map_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """
    Map boxes and return the smallest upright boxes around the results.

    Args:
        boxes: (M, 4) XYXY pixels, M = 0 allowed.
        matrix: (3, 3) affine matrix.

    Returns:
        (M, 4) in the dtype of `boxes`; the arithmetic is done in that of the matrix.
    """
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).to(matrix.dtype)
    corners = corners @ matrix[:2, :2].T + matrix[:2, 2]
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1).to(boxes.dtype)


def transfer_boxes(
    boxes: Tensor, matrix: Tensor, size: tuple[int, int], erased: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Move boxes of one view of an image to another, of which a part may be erased.

    Args:
        boxes: (M, 4) XYXY pixels of the one view, M = 0 allowed.
        matrix: (3, 3) from its pixels to those of the other view.
        size: (height, width) of the other view.
        erased: (E, 4) rectangles of the other view, E = 0 allowed.

    Returns:
        (M, 4) boxes, clipped to the other view, and (M,) bool: whether enough is left of them. At
        least `MIN_VISIBLE` of the area must be inside the view and not erased, overlapping
        rectangles counting twice (MixPL, https://arxiv.org/abs/2312.07006), and a pixel each way.
    """
    whole = map_boxes(boxes, matrix)
    clipped = clip_boxes_to_image(whole, size)
    corners = torch.max(clipped[:, None, :2], erased[:, :2])
    ends = torch.min(clipped[:, None, 2:], erased[:, 2:])
    hidden = (ends - corners).clamp(min=0).prod(2).sum(1)
    is_visible = box_area(clipped) - hidden >= MIN_VISIBLE * box_area(whole)
    return clipped, is_visible & ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(1)
