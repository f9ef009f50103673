"""
Weighted classification loss with soft targets.

Shape shorthand: R regions of all images, K foreground classes (background is index K).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    log_q = F.log_softmax(logits, dim=1)
    loss = -probs * log_q
    if gamma > 0:
        # 1 - q without cancellation; the floor keeps the gradient of the power finite at q = 1.
        loss = loss * (-torch.expm1(log_q)).clamp(min=torch.finfo(log_q.dtype).tiny) ** gamma
    return (weights * loss.sum(1)).sum() / max(len(logits), 1)
