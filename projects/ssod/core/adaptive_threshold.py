"""
A threshold for each class, such that teachers find as many boxes as the labels make expect.

ACT of LabelMatch (https://arxiv.org/abs/2206.06608).

Shape shorthand: R detections, K foreground classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ssod.core.filters import (
    PSEUDO_LABEL_FILTER_REGISTRY,
    PseudoLabelFilter,
    kept_rows,
    to_pseudo_labels,
)
from ssod.core.running_stats import LabelDistribution, ScoreQueue
from ssod.core.structures import Detections, PseudoLabels
from ssod.errors import InputError

Source = Literal["queue", "sweep"]


def class_thresholds(
    scores: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    num_labeled: int,
    num_unlabeled: int,
    reliable_fraction: float = 0.2,
    min_score: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """
    Return the scores at which as many detections of a class are kept as labels make expect.

    ACT of LabelMatch (https://arxiv.org/abs/2206.06608): unlabeled images have as many boxes
    of class c an image as labeled ones, `k = max(n_c, 1) * num_unlabeled // num_labeled`
    in all. `score >= uncertain[c]` keeps the k best detections of the class, and `reliable[c]` the
    best `floor(reliable_fraction * k + 1e-9)`; both at least one and at most all of them, and
    more where scores tie. Differs from the published code: that keeps k + 1 (its rank is an index
    from 0), and takes k from a product of floats, which can be one too small.

    Args:
        scores: (R,) probabilities of detections on `num_unlabeled` images; any order.
        labels: (R,) int64 in [0, K]; rows of class K, the background, are left out.
        class_counts: (K,) labeled boxes of each class; none counts as one.
        num_labeled: labeled images.
        num_unlabeled: images that the detections are from.
        reliable_fraction: share of the expected boxes that is reliable, in [0, 1].
        min_score: least threshold, also that of a class without detections.

    Returns:
        reliable (K,) and uncertain (K,), of the type of `scores`; reliable >= uncertain.

    Raises:
        ValueError: for NaN scores, labels outside [0, K], other shapes, or numbers out of range.

    Note: waits for the device; no reduction over ranks.
    """
    num_classes = len(class_counts)
    _check(scores, labels, num_classes, num_labeled, num_unlabeled, reliable_fraction)
    # By class, and in a class the best first.
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    sorted_labels = labels[order]
    classes = torch.arange(num_classes, device=labels.device)
    start = torch.searchsorted(sorted_labels, classes)
    found = torch.searchsorted(sorted_labels, classes, right=True) - start

    expected = class_counts.to(start).clamp(min=1) * num_unlabeled // num_labeled
    # 1e-9: in floats 0.29 * 100 is 28.999999999999996.
    reliable = (reliable_fraction * expected.double() + 1e-9).floor().long()
    # One more row, so that there is one to look up without any detection.
    padded = torch.cat([scores[order], scores.new_zeros(1)])

    def score_at(rank: Tensor) -> Tensor:
        row = (start + rank.clamp(min=1).minimum(found) - 1).clamp(min=0)
        return torch.where(found > 0, padded[row], 0.0).clamp(min=min_score)

    return score_at(reliable), score_at(expected)


def _check(
    scores: Tensor,
    labels: Tensor,
    num_classes: int,
    num_labeled: int,
    num_unlabeled: int,
    reliable_fraction: float,
) -> None:
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            "scores and labels must be of one shape (R,), "
            f"got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if num_labeled < 1 or num_unlabeled < 0:
        raise ValueError(
            "num_labeled must be at least 1 and num_unlabeled at least 0, "
            f"got {num_labeled} and {num_unlabeled}"
        )
    if not 0 <= reliable_fraction <= 1:
        raise ValueError(f"reliable_fraction must be in [0, 1], got {reliable_fraction}")
    num_nan, num_outside = torch.stack(
        [scores.isnan().sum(), ((labels < 0) | (labels > num_classes)).sum()]
    ).tolist()
    if num_nan:
        raise ValueError(
            f"scores must be probabilities, got {num_nan} NaN among {len(scores)}: "
            "the teacher's weights or its input are not finite"
        )
    if num_outside:
        raise ValueError(
            f"labels must be in [0, {num_classes}], got {num_outside} others among {len(labels)}"
        )


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class AdaptiveClassThreshold(PseudoLabelFilter):
    """
    Keep detections above their class's threshold, with weight 1 above a second, higher one.

    ACT of LabelMatch (https://arxiv.org/abs/2206.06608), see `class_thresholds`. Boxes between
    the thresholds are returned as not `reliable`, with weights of 0. So they are learned neither as
    objects nor as background: box heads give matched regions no loss (they still count in its
    divisor and among the sampled regions), and the RPN ignores their anchors. With
    `SSOD.RPN_IGNORE_WEIGHT` 0 the RPN learns them as objects, as LabelMatch's does.

    Where the thresholds come from:

    - "queue": the detections of the last `queue_images` images that the filter was given in
      training, over all ranks. In the spirit of LabelMatch's online variant, which keeps 20
      scores of each class. Computed at the first call, then every `refresh_period` iterations and
      whenever the queue has a tenth more images than the last time: few images say little,
      so a filling queue cannot wait for the period.
    - "sweep": the published method. Thresholds come from the teacher's detections on a sample of
      `sweep_images` unlabeled images, at the end of the burn-in and every `refresh_period`
      iterations.

    Until there are thresholds, all detections of at least `min_score` are undecided: nothing is
    learned as an object, and nothing that the teacher finds as background.

    Args:
        num_classes: K.
        source: "queue" or "sweep".
        refresh_period: iterations.
        queue_images: images in the queue.
        max_detections: most detections of an image; of more the best are remembered.
        reliable_fraction: share of the expected boxes that is reliable, in [0, 1].
        min_score: least threshold, in [0, 1].
        sweep_images: images of a sweep.
        passes: calls of an iteration in train mode.

    Raises:
        InputError: if an argument is out of range.

    Note: with "queue" one reduction a call in train mode; every rank gives the same number of
    images. NaN scores are never kept, and a ValueError when the thresholds are computed next.
    """

    reliable_thresh: Tensor
    uncertain_thresh: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        source: Source = "queue",
        refresh_period: int = 1000,
        queue_images: int = 12800,
        max_detections: int = 100,
        reliable_fraction: float = 0.2,
        min_score: float = 0.05,
        sweep_images: int = 10000,
        passes: int = 1,
    ):
        super().__init__()
        if source not in ("queue", "sweep"):
            raise InputError(f'SSOD.FILTER.SOURCE must be "queue" or "sweep", got "{source}"')
        for key, value in {
            "SSOD.FILTER.REFRESH_PERIOD": refresh_period,
            "SSOD.FILTER.QUEUE_IMAGES": queue_images,
            "SSOD.FILTER.SWEEP_IMAGES": sweep_images,
            "TEST.DETECTIONS_PER_IMAGE": max_detections,
        }.items():
            if value < 1:
                raise InputError(f"{key} must be at least 1, got {value}")
        for key, share in {
            "SSOD.FILTER.RELIABLE_FRACTION": reliable_fraction,
            "min_score": min_score,
        }.items():
            if not 0 <= share <= 1:
                raise InputError(f"{key} must be in [0, 1], got {share}")
        self.source = source
        self.refresh_period = refresh_period
        self.reliable_fraction = reliable_fraction
        self.min_score = min_score
        self.sweep_images = sweep_images
        self.passes = passes
        self.labels = LabelDistribution(num_classes)
        if source == "queue":
            self.queue = ScoreQueue(num_classes, queue_images, max_detections)
        self.register_buffer("reliable_thresh", torch.full((num_classes,), math.inf))
        self.register_buffer("uncertain_thresh", torch.full((num_classes,), float(min_score)))
        self.calls = 0
        self.images_at_refresh = 0
        self.has_thresholds = False

    def get_extra_state(self) -> Tensor:
        """Counts and whether there are thresholds, for the checkpoint."""
        return torch.tensor([self.calls, self.images_at_refresh, int(self.has_thresholds)])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.calls, self.images_at_refresh, has_thresholds = state.tolist()
        self.has_thresholds = bool(has_thresholds)

    @property
    def is_ready(self) -> bool:
        """Whether there are thresholds."""
        return self.has_thresholds

    def set_label_distribution(self, class_counts: Tensor, num_labeled: int) -> None:
        """Remember how often labels have each class; needed before training and sweeps."""
        self.labels.set(class_counts, num_labeled)

    def sweep_request(self, iterations: int) -> int | None:
        """Return the size of a sweep if one is due, None if not or if there are none."""
        is_due = not self.has_thresholds or iterations % self.refresh_period == 0
        return self.sweep_images if self.source == "sweep" and is_due else None

    def set_thresholds_from(self, scores: Tensor, labels: Tensor, num_images: int) -> None:
        """
        Compute the thresholds from the teacher's detections on a sample of images.

        Args:
            scores: (R,) of all ranks' images, the same on every rank.
            labels: (R,) int64 in [0, K]; rows of class K are left out.
            num_images: images of the sample, with those where nothing was found.

        Raises:
            ValueError: for NaN scores, labels out of range, or labels that were never told.
        """
        self.labels.check_known(type(self).__name__)
        reliable, uncertain = class_thresholds(
            scores.detach().float(),
            labels,
            self.labels.class_counts,
            self.labels.num_labeled,
            num_images,
            self.reliable_fraction,
            self.min_score,
        )
        self.reliable_thresh.copy_(reliable)
        self.uncertain_thresh.copy_(uncertain)
        self.has_thresholds = True

    @torch.no_grad()
    def forward(self, detections: list[Detections]) -> list[PseudoLabels]:
        """Filter each image's (R,) detections; an image may keep none."""
        if self.training and self.source == "queue":
            self._update(detections)
        classes = torch.cat([d.classes for d in detections])
        # As precise as the thresholds: a score must not be below the threshold made of it.
        scores = torch.cat([d.scores for d in detections]).float()
        sizes = [len(d) for d in detections]
        reliable = (scores >= self.reliable_thresh[classes]).split(sizes)
        rows = kept_rows((scores >= self.uncertain_thresh[classes]).split(sizes))
        return [
            to_pseudo_labels(d[row], sure[row].to(d.scores.dtype), sure[row])
            for d, row, sure in zip(detections, rows, reliable, strict=True)
        ]

    def _update(self, detections: list[Detections]) -> None:
        self.labels.check_known(type(self).__name__)
        self.queue.push(detections)
        num_images = self.queue.num_filled
        has_grown = 10 * num_images >= 11 * self.images_at_refresh
        if has_grown or self.calls % (self.refresh_period * self.passes) == 0:
            self.set_thresholds_from(*self.queue.scores_and_classes(), num_images)
            self.images_at_refresh = num_images
        self.calls += 1

    def metrics(self) -> dict[str, Tensor]:
        """Return both thresholds' means over classes; 1 for reliable while there are none."""
        return {
            "pseudo/reliable_thresh": self.reliable_thresh.clamp(max=1).mean(),
            "pseudo/uncertain_thresh": self.uncertain_thresh.mean(),
        }
