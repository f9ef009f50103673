"""
Pseudo-label filters: which teacher detections a student learns from, and how much.

Shape shorthand: R detections of one image, K foreground classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ssod.core.structures import Detections, PseudoLabels
from ssod.errors import InputError

PSEUDO_LABEL_FILTER_REGISTRY = Registry("PSEUDO_LABEL_FILTER")
PSEUDO_LABEL_FILTER_REGISTRY.__doc__ = """
Registry of `PseudoLabelFilter` classes, chosen by `SSOD.FILTER.NAME`.

The arguments of a constructor are keys of `SSOD.FILTER` in lower case. It may also ask for
`num_classes`, for `max_detections` of an image, and for `passes`, the calls of an iteration (more
than one if gradients are accumulated).
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
            instead of being ignored, unless a method learns them there.
    """

    is_soft = False
    drops_undecided = False

    @property
    def is_ready(self) -> bool:
        """Whether it can tell yet what is learned."""
        return True

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

    def sweep_request(self, iterations: int) -> int | None:
        """
        Return of how many unlabeled images it needs the teacher's detections now, None for none.

        Args:
            iterations: done since the end of the burn-in.
        """
        return None

    def set_thresholds_from(self, scores: Tensor, labels: Tensor, num_images: int) -> None:
        """
        Take what a sweep has found; called after each `sweep_request`.

        Args:
            scores: (R,) of all ranks' images, the same on every rank.
            labels: (R,) int64 in [0, K]; rows of class K, the background, are no detections.
            num_images: images of the sample, with those where nothing was found.
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


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class FixedThreshold(PseudoLabelFilter):
    """
    Keep detections with a score above one threshold, all with weight 1.

    The filter of Unbiased Teacher (https://arxiv.org/abs/2102.09480): strictly above, default 0.7.
    Detections with a score in (undecided_thresh, score_thresh] are kept for methods, with weights
    of 0 and not `reliable`; to the main branch they are background unless a method learns them.

    Args:
        score_thresh: probability in [0, 1].
        undecided_thresh: probability up to `score_thresh`; None for the same.

    Raises:
        InputError: if a threshold is out of range.
    """

    def __init__(self, score_thresh: float = 0.7, undecided_thresh: float | None = None):
        super().__init__()
        if not 0 <= score_thresh <= 1:
            raise InputError(
                f"SSOD.FILTER.SCORE_THRESH must be in [0, 1], got {score_thresh}. "
                "Scores are probabilities, not logits."
            )
        if undecided_thresh is None:
            undecided_thresh = score_thresh
        if not 0 <= undecided_thresh <= score_thresh:
            raise InputError(
                f"undecided_thresh must be in [0, score_thresh {score_thresh}], "
                f"got {undecided_thresh}"
            )
        self.score_thresh = score_thresh
        self.undecided_thresh = undecided_thresh
        self.drops_undecided = undecided_thresh < score_thresh

    def forward(self, detections: list[Detections]) -> list[PseudoLabels]:
        """Filter each image's (R,) detections; an image may keep none."""
        rows = kept_rows([d.scores > self.undecided_thresh for d in detections])
        kept = [d[row] for d, row in zip(detections, rows, strict=True)]
        reliable = [k.scores > self.score_thresh for k in kept]
        return [
            to_pseudo_labels(k, sure.to(k.scores.dtype), sure)
            for k, sure in zip(kept, reliable, strict=True)
        ]
