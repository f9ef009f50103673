"""
Pseudo-label filters: which teacher detections a student learns from, and how much.

Shape shorthand: R detections of one image, K foreground classes.
"""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from ssod.core.structures import Detections, PseudoLabels
from ssod.errors import InputError

PSEUDO_LABEL_FILTER_REGISTRY = Registry("PSEUDO_LABEL_FILTER")
PSEUDO_LABEL_FILTER_REGISTRY.__doc__ = """
Registry of `PseudoLabelFilter` classes, chosen by `SSOD.FILTER.NAME`.

A registered class has `from_config(cfg, num_classes)`, which reads its keys of `cfg.SSOD.FILTER`.
"""


class PseudoLabelFilter(nn.Module):
    """
    Base class: `forward(list[Detections]) -> list[PseudoLabels]`, one an image.

    State that changes in training lives in buffers. In train mode a filter may update it from
    the detections; in eval mode it must not.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> PseudoLabelFilter:
        """Build the filter from `cfg.SSOD.FILTER`."""
        raise NotImplementedError


def build_filter(cfg: CfgNode, num_classes: int) -> PseudoLabelFilter:
    """
    Build the filter that `SSOD.FILTER.NAME` names.

    Raises:
        InputError: if no such filter is registered, or it refuses a key.
    """
    name = cfg.SSOD.FILTER.NAME
    if name not in PSEUDO_LABEL_FILTER_REGISTRY:
        known = sorted(name for name, _ in PSEUDO_LABEL_FILTER_REGISTRY)
        raise InputError(f"SSOD.FILTER.NAME must be one of {known}, got {name!r}")
    return PSEUDO_LABEL_FILTER_REGISTRY.get(name).from_config(cfg, num_classes)


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class FixedThreshold(PseudoLabelFilter):
    """
    Keep detections with a score above one threshold, all with weight 1.

    The filter of Unbiased Teacher (https://arxiv.org/abs/2102.09480): strictly above, default 0.7.

    Args:
        score_thresh: probability in [0, 1].

    Raises:
        ValueError: if `score_thresh` is outside [0, 1].
    """

    def __init__(self, score_thresh: float = 0.7):
        super().__init__()
        if not 0 <= score_thresh <= 1:
            raise InputError(
                f"SSOD.FILTER.SCORE_THRESH must be in [0, 1], got {score_thresh}. "
                "Scores are probabilities, not logits."
            )
        self.score_thresh = score_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> FixedThreshold:
        """Read `SSOD.FILTER.SCORE_THRESH`."""
        return cls(cfg.SSOD.FILTER.SCORE_THRESH)

    def forward(self, detections: list[Detections]) -> list[PseudoLabels]:
        """Filter each image's (R,) detections; an image may keep none."""
        above = [d.scores > self.score_thresh for d in detections]
        # The kept rows first, in their order: one host sync a batch instead of one a field.
        orders = [mask.argsort(descending=True, stable=True) for mask in above]
        counts = torch.stack([mask.sum() for mask in above]).tolist()
        return [
            self._keep(d[order[:count]])
            for d, order, count in zip(detections, orders, counts, strict=True)
        ]

    @staticmethod
    def _keep(kept: Detections) -> PseudoLabels:
        ones = torch.ones_like(kept.scores)
        return PseudoLabels(
            boxes=kept.boxes,
            classes=kept.classes,
            scores=kept.scores,
            weights=ones,
            box_weights=ones,
            class_probs=kept.class_probs,
            reliable=torch.ones_like(kept.classes, dtype=torch.bool),
        )
