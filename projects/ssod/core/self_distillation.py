"""
Two classifiers of the same regions that learn from each other where pseudo-boxes are uncertain.

SD of LSM (https://arxiv.org/abs/2306.16201).

Shape shorthand: R regions of all images, K foreground classes (background is index K).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def self_distillation_loss(
    main_logits: Tensor,
    aux_logits: Tensor,
    normalizer: Tensor | float,
    weights: Tensor | None = None,
) -> Tensor:
    """
    Divergence of the main classifier's distributions from those of the auxiliary one.

    SD of LSM (https://arxiv.org/abs/2306.16201), equation 7: the sum of KL(aux || main) over
    regions and classes, the background's included. The gradient goes to both.

    Args:
        main_logits: (R, K + 1).
        aux_logits: (R, K + 1) of the same regions; their distribution is the target.
        normalizer: what the sum is divided by, above 0.
        weights: (R,) factor on each region; None for 1.

    Returns:
        Scalar; with R = 0 a zero connected to both logits.
    """
    main, aux = main_logits.log_softmax(1), aux_logits.log_softmax(1)
    divergence = F.kl_div(main, aux, reduction="none", log_target=True).sum(1)
    if weights is not None:
        divergence = divergence * weights
    return divergence.sum() / normalizer
