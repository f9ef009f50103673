"""
What a method adds to the mean teacher: hooks, the record of a step, and the registry.

Shape shorthand: N images, R regions of all images, K foreground classes (background is index K),
D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from ssod.core.geometry import map_boxes
from ssod.core.interfaces import Candidates, Features, LossOutput, RegionDetector, Rescore
from ssod.core.structures import (
    Detections,
    ImageBatch,
    Layer,
    PseudoLabels,
    RegionOutput,
    RegionSamples,
    Views,
)

Undecided = Literal["", "branch", "main"]

METHOD_REGISTRY = Registry("METHOD")
METHOD_REGISTRY.__doc__ = """
Registry of `Method` classes, in the order in which their hooks are called.

`SSOD.<group>.ENABLED` adds one to a training. The keyword arguments of its constructor are the
other keys of the group, in lower case.
"""


@dataclass
class Step:
    """
    What an iteration has computed so far; fields are filled from top to bottom.

    Attributes:
        student: in train mode.
        teacher: in eval mode.
        iterations: done since the end of the burn-in; below 0 during it.
        labeled: views of labeled images, with targets.
        labeled_batch: the views that are learned, of N images; "both" has the strong ones first.
        labeled_features: the student's, of `labeled_batch`.
        labeled_output: the student's losses of `labeled_batch`.
        unlabeled: views of N unlabeled images; None while the iteration uses none, like all below.
            Of S strong views, which `mix` may have changed, and of which those without a pseudo-box
            may have been left out.
        teacher_features: of the weak views.
        candidates: what the teacher sees in the weak views before non-maximum suppression.
        detections: the teacher's, in the weak views.
        pseudo_labels: what the filter kept of them, undecided boxes included. A method that decides
            about boxes in this iteration changes them here, for the methods after it as well.
        unmixed: the unlabeled images before `mix`.
        unmixed_labels: their pseudo-labels, as they were then.
        empty_images: share of the strong views in which the main branch had no target.
        learned: those of `pseudo_labels` that are the main branch's targets, as they were then.
        batch: the S strong views.
        features: the student's, of `batch`.
        main: the main branch's losses of `batch`.
        shared: what a method computes in one hook for another, under names of its own.
        rescore: all methods' `rescore`, for what the teacher says of other regions.
        drops_undecided: whether boxes that are not `reliable` are background to the main branch.
    """

    student: RegionDetector
    teacher: RegionDetector
    iterations: int
    labeled: Views
    labeled_batch: ImageBatch | None = None
    labeled_features: Features = field(default_factory=dict)
    labeled_output: LossOutput | None = None
    unlabeled: Views | None = None
    teacher_features: Features = field(default_factory=dict)
    candidates: Candidates | None = None
    detections: list[Detections] = field(default_factory=list)
    pseudo_labels: list[PseudoLabels] = field(default_factory=list)
    unmixed: Views | None = None
    unmixed_labels: list[PseudoLabels] = field(default_factory=list)
    empty_images: float = 0.0
    learned: list[PseudoLabels] = field(default_factory=list)
    batch: ImageBatch | None = None
    features: Features = field(default_factory=dict)
    main: LossOutput | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    rescore: Rescore = lambda class_probs, embeddings: class_probs
    drops_undecided: bool = False

    def per_image(self, values: Tensor) -> Tensor:
        """Return the sum of values of boxes or regions, an unlabeled image that a view shows."""
        assert self.unlabeled is not None, "there are unlabeled images"
        return values.sum() / (len(self.unlabeled) * len(self.unlabeled.layers))

    def weak_boxes(self, layer: Layer, boxes: list[Tensor]) -> list[Tensor]:
        """Return where a layer of the strong views has their boxes, (R_i, 4), in the weak view."""
        assert self.unlabeled is not None, "there are unlabeled images"
        if layer.matrices is None:
            return boxes
        back = torch.linalg.inv_ex(layer.matrices).inverse  # without waiting for the device
        mapped = [map_boxes(b, matrix) for b, matrix in zip(boxes, back, strict=True)]
        return self._clip(layer, mapped)

    def _clip(self, layer: Layer, boxes: list[Tensor]) -> list[Tensor]:
        assert self.unlabeled is not None, "there are unlabeled images"
        sizes = [self.unlabeled.weak[image].shape[1:] for image in layer.images]
        return [clip_boxes_to_image(b, (h, w)) for b, (h, w) in zip(boxes, sizes, strict=True)]

    @torch.no_grad()
    def ask_teacher(self, layer: Layer, boxes: list[Tensor]) -> RegionOutput:
        """
        Score regions of weak views by the teacher, not rescored.

        Args:
            layer: which weak view is meant for each strong one.
            boxes: (R_i, 4) in pixels of the weak view, for each of the S strong views.

        Returns:
            R = sum(R_i) rows in the order of `boxes`; R = 0 is allowed.
        """
        assert self.unlabeled is not None, "there are unlabeled images"
        return score_shown(self.teacher, self.teacher_features, len(self.unlabeled), layer, boxes)

    @torch.no_grad()
    def regress(
        self, layer: Layer, boxes: list[Tensor], deltas: Tensor, classes: Tensor
    ) -> list[Tensor]:
        """
        Move regions of weak views by what the teacher says of them.

        Args:
            layer: which weak view is meant for each strong one.
            boxes: (R_i, 4) as given to `ask_teacher`.
            deltas: (R, K or 1, 4) of its answer.
            classes: (R,) in [0, K), for which regions are moved.

        Returns:
            (R_i, 4), clipped to the weak views.
        """
        moved = self.teacher.regress(torch.cat(boxes), deltas, classes)
        return self._clip(layer, list(moved.split([len(b) for b in boxes])))


def score_shown(
    detector: RegionDetector, features: Features, num_images: int, layer: Layer, boxes: list[Tensor]
) -> RegionOutput:
    """
    Score regions of weak views, given for each of the S strong views that show them.

    Args:
        detector: whose box head scores.
        features: of the weak views.
        num_images: N, of the weak views.
        layer: which of them each strong view shows.
        boxes: (R_i, 4) in pixels of the weak view, one an item of `layer`.

    Returns:
        R = sum(R_i) rows in the order of `boxes`; R = 0 is allowed.
    """
    if layer.images == list(range(num_images)):
        return detector.score_regions(features, boxes)
    # The regions of each weak view together, and back.
    order = sorted(range(len(boxes)), key=lambda row: layer.images[row])
    none = features[next(iter(features))].new_zeros(0, 4)
    per_image = [
        torch.cat([none, *(boxes[row] for row in order if layer.images[row] == image)])
        for image in range(num_images)
    ]
    ends = dict(zip(order, accumulate(len(boxes[row]) for row in order), strict=True))
    back = [torch.arange(ends[row] - len(b), ends[row]) for row, b in enumerate(boxes)]
    rows = torch.cat(back).to(none.device, non_blocking=True)
    return detector.score_regions(features, per_image)[rows]


def choose_layer(values: list[Tensor], layers: Tensor) -> Tensor:
    """Return for each row the values (R, ...) of its own layer; `layers` is (R,)."""
    if len(values) == 1:
        return values[0]
    return torch.stack(values)[layers, torch.arange(len(layers), device=layers.device)]


class Method(nn.Module):
    """
    Base class: every hook does nothing; a method overrides those it needs.

    State that changes in training lives in buffers and parameters. Parameters are trained with the
    student's, and have gradients of 0 in iterations that do not use them, which do not count as
    steps of the optimizer.

    Attributes:
        group: of its keys, below `SSOD`.
        undecided: where it learns boxes that a filter is undecided about, which `FixedThreshold`
            keeps for such a class alone: in a "branch" of its own, while they are background to
            the main one, or in the "main" one.
    """

    group: ClassVar[str]
    undecided: Undecided = ""

    def start(self, student: RegionDetector, teacher: RegionDetector) -> None:
        """Begin: the teacher has just become a copy of the student; nothing is learned yet."""

    def observe_labeled(self, step: Step) -> None:
        """Look at the labeled images of an iteration, also during the burn-in."""

    def rescore(self, class_probs: Tensor, embeddings: Tensor) -> Tensor:
        """
        Change what the teacher says of the weak views' regions, before non-maximum suppression.

        Args:
            class_probs: (R, K + 1), R = 0 allowed.
            embeddings: (R, D).

        Returns:
            (R, K + 1).
        """
        return class_probs

    def mix(
        self, views: Views, pseudo_labels: list[PseudoLabels]
    ) -> tuple[Views, list[PseudoLabels]]:
        """
        Change the strong views of unlabeled images and their pseudo-labels, before the student.

        Args:
            views: of N images; S strong views, with `layers` that say what they show. Weak views
                stay as they are.
            pseudo_labels: of each strong view.

        Returns:
            Views with other `strong`, and `mixed` to say what these show, and their pseudo-labels.
        """
        return views, pseudo_labels

    def reweight(self, step: Step, samples: RegionSamples, regions: RegionOutput) -> RegionSamples:
        """Return the main branch's samples with other weights or targets; rows as they are."""
        return samples

    def losses(self, step: Step) -> dict[str, Tensor]:
        """
        Return scalars `loss_...` to add, before `SSOD.UNSUP_LOSS_WEIGHT` and the suffix `_unsup`.

        With nothing to learn they are zeros connected to the graph.
        """
        return {}

    def metrics(self, step: Step) -> dict[str, Tensor]:
        """Return 0-dim tensors that describe the state or step; no name has "loss" in it."""
        return {}

    def idle_loss(self) -> Tensor | float:
        """Return a zero connected to every parameter, for iterations that do not use them."""
        # `DistributedDataParallel` wants a gradient of each.
        return sum(0.0 * parameter.sum() for parameter in self.parameters())
