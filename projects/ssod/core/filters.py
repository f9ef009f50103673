"""
Pseudo-label filters: which teacher detections a student learns from, and how much.

Shape shorthand: R detections of one image, K foreground classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ssod.core.structures import Detections, PseudoLabels
from ssod.errors import InputError

PSEUDO_LABEL_FILTER_REGISTRY = Registry("PSEUDO_LABEL_FILTER")
PSEUDO_LABEL_FILTER_REGISTRY.__doc__ = """
Registry of `PseudoLabelFilter` classes, chosen by `SSOD.FILTER.NAME`.

A registered class has `from_config(cfg, num_classes)`, which reads its keys of `cfg.SSOD.FILTER`.
"""


class PseudoLabelFilter(nn.Module, ABC):
    """
    Base class: `forward(list[Detections]) -> list[PseudoLabels]`, one an image.

    State that changes in training lives in buffers. In train mode a filter may update it from
    the detections; in eval mode it must not. A filter that reduces its state over ranks does so
    at every call in train mode, with and without detections.

    Attributes:
        is_soft: whether what is learned has weights other than 1.
        drops_undecided: whether boxes that are not `reliable` are background to the main branch
            instead of being ignored; only other branches learn from them then.
    """

    is_soft = False
    drops_undecided = False

    @property
    def is_ready(self) -> bool:
        """Whether it can tell yet what is learned."""
        return True

    @classmethod
    @abstractmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> PseudoLabelFilter:
        """Build the filter from `cfg.SSOD.FILTER`."""

    @abstractmethod
    def forward(self, detections: list[Detections]) -> list[PseudoLabels]:
        """Filter each image's (R,) detections; an image may keep none."""

    def set_label_distribution(self, class_counts: Tensor, num_labeled: int) -> None:
        """
        Tell the filter about the data, once, before training; this one does not need it.

        Args:
            class_counts: (K,) labeled boxes of each class, the same on every rank.
            num_labeled: labeled images.
        """

    def metrics(self) -> dict[str, Tensor]:
        """Return 0-dim tensors named `pseudo/...` that describe the state; here none."""
        return {}


def kept_rows(masks: Sequence[Tensor]) -> list[Tensor]:
    """
    Return the indices at which each image's (R,) bool mask is true, in their order.

    The counts of all images come to the host together: one sync a batch, not one a field.
    """
    orders = [mask.argsort(descending=True, stable=True) for mask in masks]
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    return [order[:count] for order, count in zip(orders, counts, strict=True)]


def to_pseudo_labels(kept: Detections, weights: Tensor, reliable: Tensor) -> PseudoLabels:
    """
    Make pseudo-labels of detections.

    Args:
        kept: (R,) detections of one image.
        weights: (R,) factor on classification and box losses.
        reliable: (R,) bool.
    """
    return PseudoLabels(
        boxes=kept.boxes,
        classes=kept.classes,
        scores=kept.scores,
        weights=weights,
        box_weights=weights,
        class_probs=kept.class_probs,
        reliable=reliable,
    )


def build_filter(cfg: CfgNode, num_classes: int) -> PseudoLabelFilter:
    """
    Build the filter that `SSOD.FILTER.NAME` names.

    Raises:
        InputError: if no such filter is registered, or it refuses a key.
    """
    # They register themselves; they import this module, so it cannot import them at its top.
    from ssod.core import adaptive_threshold, soft_match  # noqa: F401

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
    Detections with a score in (low_score_thresh, score_thresh] are kept for other branches, with
    weights of 0 and not `reliable`.

    Args:
        score_thresh: probability in [0, 1].
        low_score_thresh: probability up to `score_thresh`; None for the same.
        ignore_low_scores: whether the main branch ignores boxes between the two; otherwise they
            are background to it.

    Raises:
        InputError: if a threshold is out of range.
    """

    def __init__(
        self,
        score_thresh: float = 0.7,
        low_score_thresh: float | None = None,
        ignore_low_scores: bool = False,
    ):
        super().__init__()
        if not 0 <= score_thresh <= 1:
            raise InputError(
                f"SSOD.FILTER.SCORE_THRESH must be in [0, 1], got {score_thresh}. "
                "Scores are probabilities, not logits."
            )
        if low_score_thresh is None:
            low_score_thresh = score_thresh
        if not 0 <= low_score_thresh <= score_thresh:
            raise InputError(
                f"SSOD.LSM.ALPHA must be in [0, SSOD.FILTER.SCORE_THRESH {score_thresh}], "
                f"got {low_score_thresh}"
            )
        self.score_thresh = score_thresh
        self.low_score_thresh = low_score_thresh
        self.drops_undecided = low_score_thresh < score_thresh and not ignore_low_scores

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> FixedThreshold:
        """Read `SSOD.FILTER.SCORE_THRESH` and, if there is the branch, `SSOD.LSM`."""
        lsm = cfg.SSOD.LSM
        low = (lsm.ALPHA, lsm.IGNORE_LOW_SCORES) if lsm.ENABLED else ()
        return cls(cfg.SSOD.FILTER.SCORE_THRESH, *low)

    def forward(self, detections: list[Detections]) -> list[PseudoLabels]:
        """Filter each image's (R,) detections; an image may keep none."""
        rows = kept_rows([d.scores > self.low_score_thresh for d in detections])
        kept = [d[row] for d, row in zip(detections, rows, strict=True)]
        reliable = [k.scores > self.score_thresh for k in kept]
        return [
            to_pseudo_labels(k, sure.to(k.scores.dtype), sure)
            for k, sure in zip(kept, reliable, strict=True)
        ]
