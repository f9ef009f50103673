"""
Weights for pseudo-boxes that fall off smoothly below the running mean of the scores.

SoftMatch (https://arxiv.org/abs/2301.10921), carried from images to detections.

Shape shorthand: R detections of all images, K foreground classes, G groups that share their
statistics (one, or the classes).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ssod.core.distributed import all_reduce_sum
from ssod.core.filters import (
    PSEUDO_LABEL_FILTER_REGISTRY,
    PseudoLabelFilter,
    kept_rows,
    to_pseudo_labels,
)
from ssod.core.running_stats import LabelDistribution, RunningAverage, RunningSums
from ssod.core.structures import Detections, PseudoLabels
from ssod.errors import InputError

Scope = Literal["global", "per_class"]
Start = Literal["bias_corrected", "paper"]
Alignment = Literal["labeled", "uniform", "none"]
MIN_VAR = 1e-4  # of scores in [0, 1]; without spread every weight would be 0 or 1
MAX_RATIO = 3.0  # of "labeled"; a class that is hardly found yet would count many times over
EPS = 1e-6


def truncated_gaussian_weight(
    scores: Tensor,
    mean: Tensor | float,
    var: Tensor | float,
    n_sigma: float = 2.0,
    max_weight: float = 1.0,
) -> Tensor:
    """
    Weigh scores by a Gaussian below the mean, and fully at or above it.

    SoftMatch (https://arxiv.org/abs/2301.10921):
    `max_weight * exp(-min(score - mean, 0)^2 / (2 var / n_sigma^2))`. With the authors' n_sigma of
    2 the Gaussian is half as wide as the scores are spread.

    Args:
        scores: (R,) probabilities; R = 0 is allowed.
        mean: (R,) or scalar.
        var: (R,) or scalar, at least 0; with 0 the weight is a step.
        n_sigma: standard deviations of the scores in two of the Gaussian's.
        max_weight: weight at or above the mean.

    Returns:
        (R,) in [0, max_weight].
    """
    below = (scores - mean).clamp(max=0)
    if not isinstance(var, Tensor):
        var = scores.new_tensor(var)
    # 0 / 0 at the mean without the floor.
    exponent = below.square() * n_sigma**2 / (2 * var.clamp(min=torch.finfo(var.dtype).tiny))
    return max_weight * torch.exp(-exponent)


def uniform_alignment(
    probs: Tensor, target: Tensor, model: Tensor, eps: float = EPS, max_ratio: float | None = None
) -> Tensor:
    """
    Scale each class by how much rarer it is predicted than it should be.

    SoftMatch (https://arxiv.org/abs/2301.10921), where `target` is uniform and nothing is clipped.

    Args:
        probs: (R, K) distributions over foreground classes; R = 0 is allowed.
        target: (K,) distribution that predictions should have on average.
        model: (K,) distribution that they have.
        eps: added to both, as USB does; the paper's code has none.
        max_ratio: ratios are clipped to [1 / max_ratio, max_ratio] if it is given.

    Returns:
        (R, K) `probs * (target + eps) / (model + eps)` with rows renormalised; zeros stay zeros.
    """
    ratio = (target + eps) / (model + eps)
    if max_ratio is not None:
        ratio = ratio.clamp(1 / max_ratio, max_ratio)
    return _normalized(probs * ratio)


def _normalized(rows: Tensor) -> Tensor:
    return rows / rows.sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class SoftMatchWeighting(PseudoLabelFilter):
    """
    Keep detections above a low floor, weighted by `truncated_gaussian_weight` of their score.

    SoftMatch (https://arxiv.org/abs/2301.10921) with detections for images. The pool, of which
    statistics are gathered and which is kept, are detections with a score of at least `pool_floor`
    whose class is the likeliest foreground class of their region. In train mode a batch moves
    the running mean and variance of the scores first and is weighted by them then, as in the
    paper. The weight is that of the score after alignment, while class and statistics come from
    scores as they are (the paper's code; USB aligns before both). All labels are `reliable`.

    Differs from the paper, where a switch does not say otherwise:

    - `start="bias_corrected"`: the running moments are those of detections, not averages of
      batches' moments: `RunningSums` of their number, scores and squared scores. Two boxes do not
      count like two hundred, one box or none needs no special case, and no start of variance 1
      gives every box a full weight for thousands of iterations.
      "paper": mean 1/K and variance 1, then averages of batch means and unbiased batch
      variances; of one box the mean alone. The classes' shares start from the first batch (as in
      USB; the paper's code: from 1/K).
    - `alignment`: acts on the distribution over foreground classes; the background keeps its
      probability, and the weight is that of the detection's own class, not of the class that
      alignment made the likeliest. "uniform": towards uniform classes, as published. "labeled":
      towards the classes' shares of labeled boxes, since boxes are long-tailed by nature, with
      ratios clipped to [1/3, 3]. "none": not at all.
    - The variance is at least 1e-4 where weights are computed.

    An empty pool leaves all means and variances as they are. Detections with non-finite numbers
    are never in the pool. Before the first detection everything in it weighs 1, unless `start` is
    "paper".

    Args:
        num_classes: K.
        ema_decay: share of the statistics kept at each call in train mode, in (0, 1).
        n_sigma: of `truncated_gaussian_weight`, above 0.
        scope: "global": one mean and variance. "per_class": of each class, which stay as they are
            while the class is not in the pool; rare classes have too few boxes for it.
        start: "bias_corrected" or "paper".
        alignment: "labeled", "uniform" or "none".
        pool_floor: probability in [0, 1]. It decides the precision of the pool.

    Raises:
        InputError: if an argument is out of range.

    Note: one reduction of 3 G + K numbers a call in train mode. Statistics are float64.
    """

    is_soft = True

    def __init__(
        self,
        num_classes: int,
        *,
        ema_decay: float = 0.999,
        n_sigma: float = 2.0,
        scope: Scope = "global",
        start: Start = "bias_corrected",
        alignment: Alignment = "labeled",
        pool_floor: float = 0.5,
    ):
        super().__init__()
        _check(ema_decay, n_sigma, pool_floor)
        for key, value, choices in (
            ("SCOPE", scope, get_args(Scope)),
            ("START", start, get_args(Start)),
            ("ALIGNMENT", alignment, get_args(Alignment)),
        ):
            if value not in choices:
                raise InputError(f"SSOD.FILTER.{key} must be one of {choices}, got {value!r}")
        self.num_classes = num_classes
        self.n_sigma = n_sigma
        self.scope = scope
        self.start = start
        self.alignment = alignment
        self.pool_floor = pool_floor
        self.labels = LabelDistribution(num_classes)
        self.num_groups = num_classes if scope == "per_class" else 1
        self.moments: RunningAverage | RunningSums
        self.shares: RunningAverage | RunningSums
        if start == "paper":
            self.moments = RunningAverage(self.num_groups, 2, ema_decay, [1 / num_classes, 1.0])
            self.shares = RunningAverage(1, num_classes, ema_decay)
        else:
            self.moments = RunningSums(self.num_groups, 2, ema_decay, scope == "per_class")
            self.shares = RunningSums(1, num_classes, ema_decay)

    def set_label_distribution(self, class_counts: Tensor, num_labeled: int) -> None:
        """Remember (K,) labeled boxes of each class; ValueError as `LabelDistribution.set`."""
        self.labels.set(class_counts, num_labeled)

    @torch.no_grad()
    def forward(self, detections: list[Detections]) -> list[PseudoLabels]:
        """Filter and weigh each image's (R,) detections; an image may have or keep none."""
        if self.alignment == "labeled":
            self.labels.check_known(type(self).__name__)
        # Cast before anything is computed: bf16 would lose what the float64 sums keep.
        scores = torch.cat([d.scores for d in detections]).double()
        classes = torch.cat([d.classes for d in detections])
        probs = torch.cat([d.class_probs for d in detections]).double()
        is_finite = scores.isfinite() & probs.isfinite().all(1)
        foreground = probs[:, : self.num_classes]
        is_top = foreground.argmax(1) == classes
        pooled = is_finite & is_top & (scores >= self.pool_floor)
        if self.training:
            self._update(scores, classes, _normalized(foreground), pooled)
        if self.alignment != "none":
            # The background's probability stays, so the foreground's does.
            aligned = self._aligned(_normalized(foreground)) * foreground.sum(1, keepdim=True)
            scores = aligned.gather(1, classes[:, None])[:, 0]
        mean, var = (values[self._groups(classes)] for values in self.mean_and_variance())
        weights = truncated_gaussian_weight(scores, mean, var.clamp(min=MIN_VAR), self.n_sigma)
        # Not 0: samplers would take the box for one without a loss.
        weights = weights.clamp(min=torch.finfo(torch.float32).tiny)
        sizes = [len(d) for d in detections]
        return [
            to_pseudo_labels(d[row], w[row].to(d.scores.dtype), torch.ones_like(row).bool())
            for d, row, w in zip(
                detections, kept_rows(pooled.split(sizes)), weights.split(sizes), strict=True
            )
        ]

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Return (G,) float64 running moments of the scores; 0 before a group's first box."""
        first, second = self.moments.averages().unbind(1)
        if self.start == "paper":
            return first, second
        return first, (second - first.square()).clamp(min=0)

    def metrics(self) -> dict[str, Tensor]:
        """Return scalar running mean and variance, averaged over groups that have any, or 0."""
        seen = self.moments.seen()
        mean, var = ((v * seen).sum() / seen.sum().clamp(min=1) for v in self.mean_and_variance())
        return {"pseudo/running_mean": mean, "pseudo/running_var": var}

    def _groups(self, classes: Tensor) -> Tensor:
        return classes if self.scope == "per_class" else torch.zeros_like(classes)

    def _update(self, scores: Tensor, classes: Tensor, foreground: Tensor, pooled: Tensor) -> None:
        """Move the statistics by the pools of all ranks; one reduction, of a fixed length."""
        groups = torch.arange(self.num_groups, device=classes.device)
        # A product with this (G, R) matrix adds in a fixed order; index_add_ does not on a GPU.
        member = ((self._groups(classes) == groups[:, None]) & pooled).to(scores)
        # Rows outside the pool may hold NaN, which a factor of 0 would not remove.
        scores = scores.masked_fill(~pooled, 0)
        foreground = foreground.masked_fill(~pooled[:, None], 0)
        powers = torch.stack([torch.ones_like(scores), scores, scores.square()], 1)
        local = torch.cat([(member @ powers).flatten(), foreground.sum(0)])
        total = all_reduce_sum(local)

        moments = total[: 3 * self.num_groups].view(self.num_groups, 3)
        count, first, second = moments.unbind(1)
        shares = torch.cat([count.sum()[None], total[3 * self.num_groups :]])[None]
        if isinstance(self.moments, RunningAverage):
            mean = first / count
            var = ((second - first * mean) / (count - 1)).clamp(min=0)
            valid = torch.stack([count > 0, count > 1], 1)
            self.moments.update(torch.stack([mean, var], 1), valid)
        else:
            self.moments.update(moments)
        if isinstance(self.shares, RunningAverage):
            self.shares.update(shares[:, 1:] / shares[:, :1], shares[:, :1] > 0)
        else:
            self.shares.update(shares)

    def _aligned(self, foreground: Tensor) -> Tensor:
        """Align (R, K) distributions over foreground classes."""
        model = self.shares.averages()[0]
        if self.alignment == "uniform":
            return uniform_alignment(foreground, torch.full_like(model, 1 / len(model)), model)
        counts = self.labels.class_counts.to(foreground)
        target = counts / counts.sum().clamp(min=1)
        return uniform_alignment(foreground, target, model, max_ratio=MAX_RATIO)


def _check(ema_decay: float, n_sigma: float, pool_floor: float) -> None:
    if not 0 < ema_decay < 1:
        raise InputError(
            f"SSOD.FILTER.EMA_DECAY must be in (0, 1), got {ema_decay}. "
            "It is the share of the statistics kept at each update."
        )
    if not n_sigma > 0:
        raise InputError(f"n_sigma must be above 0, got {n_sigma}")
    if not 0 <= pool_floor <= 1:
        raise InputError(
            f"SSOD.FILTER.POOL_FLOOR must be in [0, 1], got {pool_floor}. "
            "Scores are probabilities, not logits."
        )
