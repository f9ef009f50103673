"""
A threshold for each class from a mixture of two Gaussians, of right and of wrong boxes.

Consistent-Teacher (https://arxiv.org/abs/2209.01589).

Shape shorthand: N images, R detections of one image, K foreground classes, L scores of a class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssod.core.distributed import all_gather
from ssod.core.filters import (
    PSEUDO_LABEL_FILTER_REGISTRY,
    PseudoLabelFilter,
    kept_rows,
    to_pseudo_labels,
)
from ssod.core.structures import Detections, PseudoLabels
from ssod.errors import InputError

MIN_SCORES = 4  # a class with fewer has no mixture (published code)
# Defaults of scikit-learn's `GaussianMixture`, which the published code fits with.
MAX_ITERS = 100
TOLERANCE = 1e-3  # of the mean log-likelihood
MIN_VAR = 1e-6  # added to variances


def mixture_thresholds(scores: Tensor, score_thresh: float) -> Tensor:
    """
    Return the most likely score of each class's better Gaussian.

    The policy "high" of Consistent-Teacher's code: of the scores that belong to the second of two
    Gaussians, that started at the largest score, the one of the highest likelihood under the
    mixture. The fit is scikit-learn's from the same start: means at the smallest and the largest
    score, variances of 1, weights of 1 / 2; at most 100 iterations, and none after one that
    changes the mean log-likelihood by less than 1e-3.

    Args:
        scores: (K, L) probabilities; 0 in places without a score.
        score_thresh: of classes with less than 4 scores, or with none in the second Gaussian, as
            if all are equal.

    Returns:
        (K,), of the type of `scores`; computed in float64, all classes at once.
    """
    valid = scores > 0
    wrong, right = _fit(scores.double(), valid)
    is_right = valid & (right > wrong)
    likelihood = torch.logaddexp(wrong, right).masked_fill(~is_right, -math.inf)
    high = scores.gather(1, likelihood.argmax(1, keepdim=True))[:, 0]
    return torch.where((valid.sum(1) >= MIN_SCORES) & is_right.any(1), high, score_thresh)


def _fit(scores: Tensor, valid: Tensor) -> Tensor:
    """Return (2, K, L) log-probabilities of Gaussian and score, after expectation-maximisation."""
    high = scores.amax(1)
    low = torch.where(valid, scores, high[:, None]).amin(1)
    count = valid.sum(1).clamp(min=1)
    means = torch.stack([low, high])
    fit = torch.stack([torch.full_like(means, 0.5), means, torch.ones_like(means)])
    is_done, bound = torch.zeros_like(high).bool(), torch.full_like(high, -math.inf)
    for _ in range(MAX_ITERS):
        log_probs = _log_probs(scores, fit)
        log_likelihood = torch.logaddexp(*log_probs)
        share = (log_probs - log_likelihood).exp() * valid
        size = share.sum(2) + 10 * torch.finfo(share.dtype).eps
        means = (share * scores).sum(2) / size
        spread = (share * (scores - means[..., None]).square()).sum(2) / size
        new = torch.stack([size / count, means, spread + MIN_VAR])
        # A class that has converged stays as it is: leaving the loop would wait for the device.
        fit = torch.where(is_done, fit, new)
        last, bound = bound, (log_likelihood * valid).sum(1) / count
        is_done = is_done | ((bound - last).abs() < TOLERANCE)
    return _log_probs(scores, fit)


def _log_probs(scores: Tensor, fit: Tensor) -> Tensor:
    weights, means, variances = fit[..., None].unbind()
    squares = (scores - means).square() / variances
    return weights.log() - (squares + (2 * math.pi * variances).log()) / 2


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class GaussianMixtureThreshold(PseudoLabelFilter):
    """
    Keep detections above their class's threshold, which follows the scores, all with weight 1.

    The class thresholds of Consistent-Teacher (https://arxiv.org/abs/2209.01589). Of
    an image only the best detections are looked at, one more than its scores add up to, rounded.
    Each class remembers its last `num_scores` of them, over all ranks, and takes its threshold from
    them at each call in train mode, `mixture_thresholds`; a detection is kept if it was looked at
    and its score is strictly above. Detections that are not kept are background.

    Differs from the published code: the scores are of all ranks, not each rank's own; of more
    than `num_scores` new ones the last are remembered, not the first; and a class with few scores
    has `score_thresh`, where the published configs keep whatever was looked at. There is no floor
    but the detector's own, `MODEL.ROI_HEADS.SCORE_THRESH_TEST` (0.05).

    Args:
        num_classes: K.
        score_thresh: threshold of a class with less than 4 scores, in [0, 1].
        num_scores: L, scores of a class to remember (published configs: 100).
        max_detections: most detections of an image; of more the best are remembered.

    Raises:
        InputError: if an argument is out of range.

    Note: one gather of a fixed length a call in train mode; every rank gives the same number of
    images. NaN scores are never kept nor remembered.
    """

    scores: Tensor
    thresholds: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        score_thresh: float = 0.7,
        num_scores: int = 100,
        max_detections: int = 100,
    ):
        super().__init__()
        if not 0 <= score_thresh <= 1:
            raise InputError(
                f"SSOD.FILTER.SCORE_THRESH must be in [0, 1], got {score_thresh}. "
                "Scores are probabilities, not logits."
            )
        for key, value in {
            "num_scores": num_scores,
            "TEST.DETECTIONS_PER_IMAGE": max_detections,
        }.items():
            if value < 1:
                raise InputError(f"{key} must be at least 1, got {value}")
        self.score_thresh = score_thresh
        self.max_detections = max_detections
        # Oldest first; 0 in places that nothing has come to.
        self.register_buffer("scores", torch.zeros(num_classes, num_scores))
        self.register_buffer("thresholds", torch.full((num_classes,), float(score_thresh)))

    @torch.no_grad()
    def forward(self, detections: list[Detections]) -> list[PseudoLabels]:
        """Filter each image's (R,) detections; an image may keep none."""
        # As precise as the thresholds, which are some of the scores.
        scores = [d.scores.float() for d in detections]
        candidates = [_expected(s) for s in scores]
        if self.training:
            self._update(scores, [d.classes for d in detections], candidates)
        rows = kept_rows(
            [
                near & (s > self.thresholds[d.classes])
                for near, s, d in zip(candidates, scores, detections, strict=True)
            ]
        )
        kept = [d[row] for d, row in zip(detections, rows, strict=True)]
        return [
            to_pseudo_labels(k, torch.ones_like(k.scores), torch.ones_like(k.classes).bool())
            for k in kept
        ]

    def _update(
        self, scores: list[Tensor], classes: list[Tensor], candidates: list[Tensor]
    ) -> None:
        """Remember the candidates of all ranks, and fit; as many images on every rank."""
        num_classes = len(self.thresholds)
        # Both as float32, in which classes up to 2^24 are exact: one gather for both.
        block = self.scores.new_zeros(len(scores), self.max_detections, 2)
        block[..., 1] = num_classes  # the background: no score
        for row, s, c, near in zip(block, scores, classes, candidates, strict=True):
            order = _best_first(s)[: self.max_detections]
            row[: len(order), 0] = s[order]
            row[: len(order), 1] = c.masked_fill(~near, num_classes)[order].to(row)
        self._push(*all_gather(block).view(-1, 2).unbind(1))
        self.thresholds.copy_(mixture_thresholds(self.scores, self.score_thresh))

    def _push(self, scores: Tensor, classes: Tensor) -> None:
        """Add (R,) scores of classes in [0, K], in their order; those of K are left out."""
        num_classes, length = self.scores.shape
        order = classes.argsort(stable=True)
        new, by_class = scores[order], classes[order]
        labels = torch.arange(num_classes, device=scores.device).to(by_class)
        start = torch.searchsorted(by_class, labels)[:, None]
        num_new = torch.searchsorted(by_class, labels, right=True)[:, None] - start
        # Places in the old scores, followed by the new ones.
        place = torch.arange(length, device=scores.device) + num_new
        old = self.scores.gather(1, place.clamp(max=length - 1))
        row = (start + place - length).clamp(min=0, max=len(new) - 1)
        self.scores.copy_(torch.where(place < length, old, new[row]))

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean of the thresholds over classes."""
        return {"pseudo/reliable_thresh": self.thresholds.mean()}


def _best_first(scores: Tensor) -> Tensor:
    """Return the order of (R,) scores; those that are NaN come last."""
    return scores.nan_to_num(0).argsort(descending=True, stable=True)


def _expected(scores: Tensor) -> Tensor:
    """
    Return (R,) bool: the best scores, one more than all of them add up to, rounded.

    Scores are probabilities that a box is right, so their sum is the number of right ones that
    the image is expected to have.
    """
    number = (scores.nan_to_num(0).double().sum() + 0.5).floor()
    is_near = torch.zeros_like(scores).bool()
    is_near[_best_first(scores)] = torch.arange(len(scores), device=scores.device) <= number
    return is_near & (scores > 0)
