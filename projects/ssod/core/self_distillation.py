"""
Two classifiers of the same regions that learn from each other where pseudo-boxes are uncertain.

SD of LSM (https://arxiv.org/abs/2306.16201).

Shape shorthand: R regions of all images, K foreground classes (background is index K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor

from ssod.core.structures import PseudoLabels, RegionSamples
from ssod.errors import InputError

Target = Literal["aux", "main", "both"]
Norm = Literal["sampled", "distilled"]


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


@dataclass(frozen=True)
class SelfDistillation:
    """
    Which regions are distilled, and in which direction.

    Attributes:
        weight: factor on the loss.
        target: classifier whose distribution is the target: "aux" (LSM), "main" or "both", the mean
            of the two directions.
        detach: stop the gradient to the target. LSM lets both learn.
        scores: None: a region matched to a box that the main branch learns with weight w is
            distilled with weight 1 - w. (low, high): regions whose likeliest foreground class has
            an auxiliary probability in (low, high] are distilled, whatever they are matched to.
        norm: divide by the number of regions "sampled", as the classification loss does, or by the
            sum of the weights of those "distilled"; of this process in either case.

    Raises:
        InputError: if an attribute is out of range.
    """

    weight: float = 1.0
    target: Target = "aux"
    detach: bool = False
    scores: tuple[float, float] | None = None
    norm: Norm = "sampled"

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise InputError(f"SSOD.LSM.DISTILL_WEIGHT must be at least 0, got {self.weight}")
        for key, value, choices in (
            ("TARGET", self.target, get_args(Target)),
            ("NORM", self.norm, get_args(Norm)),
        ):
            if value not in choices:
                raise InputError(f"SSOD.LSM.DISTILL_{key} must be one of {choices}, got {value!r}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SelfDistillation | None:
        """
        Read `SSOD.LSM.DISTILL_*`; None if the weight is 0.

        Raises:
            InputError: for a value out of range.
        """
        keys, scores = cfg.SSOD.LSM, None
        if keys.DISTILL_REGIONS not in ("pseudo", "predicted"):
            raise InputError(
                'SSOD.LSM.DISTILL_REGIONS must be "pseudo" or "predicted", '
                f"got {keys.DISTILL_REGIONS!r}"
            )
        if keys.DISTILL_REGIONS == "predicted":
            if cfg.SSOD.FILTER.NAME != "FixedThreshold":
                raise InputError(
                    'SSOD.LSM.DISTILL_REGIONS "predicted" needs the two thresholds of '
                    f"SSOD.FILTER.NAME FixedThreshold, got {cfg.SSOD.FILTER.NAME}"
                )
            scores = (keys.ALPHA, cfg.SSOD.FILTER.SCORE_THRESH)
        made = cls(
            keys.DISTILL_WEIGHT, keys.DISTILL_TARGET, keys.DISTILL_DETACH, scores, keys.DISTILL_NORM
        )
        return made if keys.DISTILL_WEIGHT else None

    @torch.no_grad()
    def region_weights(
        self, aux_logits: Tensor, samples: RegionSamples, pseudo_labels: list[PseudoLabels]
    ) -> Tensor:
        """
        Return how much each region is distilled, (R,) in [0, 1]; 0 for the background.

        Args:
            aux_logits: (R, K + 1).
            samples: the regions, matched to `pseudo_labels`.
            pseudo_labels: of each image.
        """
        if self.scores is None:
            return samples.look_up([1 - labels.weights for labels in pseudo_labels])
        low, high = self.scores
        score = aux_logits.softmax(1)[:, :-1].amax(1)
        return ((score > low) & (score <= high)).to(aux_logits.dtype)

    def loss(
        self, main_logits: Tensor, aux_logits: Tensor, weights: Tensor, num_sampled: int
    ) -> Tensor:
        """
        Return the weighted loss of the (R,) regions with a weight, of `num_sampled` in all.

        With R = 0 a zero connected to both logits.
        """
        normalizer: Tensor | float = max(num_sampled, 1)
        if self.norm == "distilled":
            normalizer = weights.sum().clamp(min=torch.finfo(weights.dtype).eps)
        pairs = {"aux": (main_logits, aux_logits), "main": (aux_logits, main_logits)}
        chosen = list(pairs.values()) if self.target == "both" else [pairs[self.target]]
        losses = [
            self_distillation_loss(
                learner, target.detach() if self.detach else target, normalizer, weights
            )
            for learner, target in chosen
        ]
        return self.weight * torch.stack(losses).mean()
