"""
Which regions a host's sampler may draw when some targets are not to be learned as objects.

Shape shorthand: M targets and P regions of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN_RATIO = 0.6180339887


def weighted_first(
    overlaps: Tensor, weights: Tensor, min_iou: float, max_objects: int
) -> tuple[Tensor, Tensor]:
    """
    Let regions of targets of weight 0 take only the places that the others leave.

    LabelMatch (https://arxiv.org/abs/2206.06608) samples regions of reliable boxes first, then of
    undecided ones, then background that matches neither. Differs from the published code, where a
    region that overlaps boxes of both kinds can be drawn as both: here it is the reliable one's.

    Args:
        overlaps: (M, P) IoU, M = 0 allowed.
        weights: (M,) at least 0.
        min_iou: from which the host's matcher calls a region an object.
        max_objects: most regions of objects that the host's sampler draws in an image.

    Returns:
        overlaps (M, P) for the host's matcher, and (P,) bool: regions that match a target of
        weight 0 and are too many; neither object nor background. Those that stay are spread evenly
        over the order of the regions, without random draws: with weights above 0 nothing changes.
    """
    if not len(weights):
        return overlaps, overlaps.new_zeros(overlaps.shape[1], dtype=torch.bool)
    is_last = (weights == 0)[:, None]
    is_object = overlaps.masked_fill(is_last, 0).amax(0) >= min_iou
    overlaps = overlaps.masked_fill(is_last & is_object, 0)
    candidates = (overlaps.amax(0) >= min_iou) & ~is_object
    # Multiples of the golden ratio fill [0, 1) evenly, however many of them are taken.
    order = torch.arange(len(candidates), device=overlaps.device) * GOLDEN_RATIO % 1
    rank = order.masked_fill(~candidates, 1).argsort(stable=True).argsort(stable=True)
    return overlaps, candidates & (rank >= max_objects - is_object.sum())
