"""
Where the pixels of an image go when it is resized and flipped, as 3 x 3 matrices.

A matrix maps (x, y, 1) of the original image to its view; the inverse maps back.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        matrix: (3, 3) affine matrix from `view_matrix`, or its inverse.

    Returns:
        (M, 4) in the dtype of `boxes`; the arithmetic is done in float64.
    """
    # Two opposite corners are enough: scaling and flipping keep the axes where they are.
    corners = boxes.reshape(-1, 2, 2).to(matrix.dtype)
    corners = corners @ matrix[:2, :2].T + matrix[:2, 2]
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1).to(boxes.dtype)
