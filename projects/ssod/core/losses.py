"""
Losses of the box head with a weight for each region.

Hosts average over regions without weights, so their adapters use these two; with weights of 1,
one-hot labels and gamma 0 they equal the hosts' own.

Shape shorthand: R regions of all images, K foreground classes (background is index K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.core.structures import RegionOutput, RegionSamples


def weighted_classification_loss(
    logits: Tensor, probs: Tensor, weights: Tensor, gamma: float = 0.0
) -> Tensor:
    """
    Softmax focal loss against soft targets, weighted by region; cross entropy for gamma 0.

    With the predicted distribution q the loss of a region is
    `-sum_c probs_c * (1 - q_c)^gamma * log q_c`. For one-hot targets this is the multi-class
    focal loss of Unbiased Teacher (https://arxiv.org/abs/2102.09480), which uses gamma 1.5
    and no class weights.

    Args:
        logits: (R, K + 1).
        probs: (R, K + 1) target distribution.
        weights: (R,) factor on each region's loss.
        gamma: focusing exponent, at least 0.

    Returns:
        Scalar `sum(weights * loss) / R`: every region counts in the divisor, also those of weight
        0. With R = 0 a zero connected to `logits`.

    Raises:
        ValueError: if gamma is below 0.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    log_q = F.log_softmax(logits, dim=1)
    loss = -probs * log_q
    if gamma > 0:
        # 1 - q without cancellation; the floor keeps the gradient of the power finite at q = 1.
        loss = loss * (-torch.expm1(log_q)).clamp(min=torch.finfo(log_q.dtype).tiny) ** gamma
    return (weights * loss.sum(1)).sum() / max(len(logits), 1)


def weighted_box_loss(
    output: RegionOutput,
    samples: RegionSamples,
    encode: Callable[[Tensor, Tensor], Tensor],
    beta: float,
) -> Tensor:
    """
    Smooth L1 loss of the box offsets of foreground regions, weighted by region.

    Args:
        output: head outputs of the sampled regions, with class-specific (R, K, 4) or
            class-agnostic (R, 1, 4) deltas.
        samples: of R regions; those of class K (background) do not count.
        encode: the host's `(gt_boxes (R, 4), boxes (R, 4)) -> deltas (R, 4)`.
        beta: where the loss turns from L2 to L1; 0 for L1.

    Returns:
        Scalar `sum(box_weights * loss) / R`, R counting background regions too. With R = 0 a zero
        connected to the deltas.
    """
    boxes = torch.cat(samples.boxes)
    foreground = samples.classes < output.logits.shape[1] - 1
    # Background rows get any valid pair of boxes: finite, and masked out without a host sync.
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes.device, dtype=boxes.dtype)
    deltas_to = encode(
        torch.where(foreground[:, None], samples.gt_boxes, unit),
        torch.where(foreground[:, None], boxes, unit),
    )
    column = samples.classes.clamp(max=output.deltas.shape[1] - 1)
    deltas = output.deltas[torch.arange(len(column), device=column.device), column]
    loss = F.smooth_l1_loss(deltas, deltas_to, beta=beta, reduction="none").sum(1)
    return (loss * samples.box_weights * foreground).sum() / max(len(loss), 1)
