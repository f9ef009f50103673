"""
Containers that travel between the hosts and the algorithms; those of `ssod.core.batch` as well.

Shape shorthand in this package: N images of a batch, M boxes of one image, R regions or
detections (of all images unless said otherwise), K foreground classes, D embedding size.
Boxes are absolute XYXY pixels of the image they were found in; the background is class K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.core.batch import ImageBatch as ImageBatch
from ssod.core.batch import Layer as Layer
from ssod.core.batch import RowFields, Targets, TensorFields
from ssod.core.batch import TwoStreamBatch as TwoStreamBatch
from ssod.core.batch import Views as Views


@dataclass
class Detections(RowFields):
    """
    What a detector found in one image, best score first.

    Attributes:
        boxes: (R, 4) pixels of the image given to the detector.
        scores: (R,) probability of the detection's class, in [0, 1].
        classes: (R,) int64 in [0, K).
        class_probs: (R, K + 1) fp32 distribution of the region behind the detection.
        embeddings: (R, D) box head features of that region.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    class_probs: Tensor
    embeddings: Tensor


@dataclass
class PseudoLabels(RowFields):
    """
    Teacher detections of one image that a filter kept.

    Attributes:
        boxes: (R, 4) pixels of the view that the student learns them in.
        classes: (R,) int64 in [0, K).
        scores: (R,) in [0, 1].
        weights: (R,) factor on the classification loss of regions matched to the box.
        box_weights: (R,) the same for their box regression loss.
        class_probs: (R, K + 1) teacher distribution.
        reliable: (R,) bool, False for boxes that a filter kept but left undecided.
        found: (R, 4) the box in pixels of the weak view; `boxes` if it is left out.
        layer: (R,) int64, of the view's layers, that of the weak view; 0 if it is left out.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    weights: Tensor
    box_weights: Tensor
    class_probs: Tensor
    reliable: Tensor
    found: Tensor = None  # type: ignore[assignment]
    layer: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.found is None:
            self.found = self.boxes
        if self.layer is None:
            self.layer = torch.zeros_like(self.classes)
        super().__post_init__()

    def to_targets(self) -> Targets:
        """Return (R,) hard-label training targets with these weights; R = 0 is allowed."""
        probs = F.one_hot(self.classes, self.class_probs.shape[1]).to(self.class_probs)
        return Targets(self.boxes, self.classes, self.weights, self.box_weights, probs)


@dataclass
class RegionSamples(TensorFields):
    """
    Regions that a host's sampler drew for training, with the targets they were matched to.

    Attributes:
        boxes: one (R_i, 4) tensor an image; the other fields are flat over images.
        classes: (R,) int64 in [0, K], K for background.
        matched: (R,) row of the own image's targets; without meaning for background.
        gt_boxes: (R, 4) box of the matched row; without meaning for background.
        weights: (R,) classification weight, 1 for background.
        box_weights: (R,) regression weight, 1 for background.
        probs: (R, K + 1) soft label, one-hot for background.
    """

    boxes: list[Tensor]
    classes: Tensor
    matched: Tensor
    gt_boxes: Tensor
    weights: Tensor
    box_weights: Tensor
    probs: Tensor

    def look_up(self, values: Sequence[Tensor]) -> Tensor:
        """
        Return what the matched target of each region has, (R,), and 0 for background regions.

        Args:
            values: (M_i,) of each image's targets.
        """
        sizes = [len(boxes) for boxes in self.boxes]
        rows = [
            v[m] if len(v) else v.new_zeros(len(m))
            for v, m in zip(values, self.matched.split(sizes), strict=True)
        ]
        is_background = self.classes == self.probs.shape[1] - 1
        return torch.cat(rows).masked_fill(is_background, 0)

    @classmethod
    def from_matches(
        cls,
        boxes: list[Tensor],
        classes: list[Tensor],
        matched: list[Tensor],
        targets: Sequence[Targets],
        num_classes: int,
    ) -> RegionSamples:
        """
        Look the weights and soft labels of R = sum(R_i) sampled regions up in the targets.

        Background regions inherit the nearest target's row from the hosts' matchers, so they are
        reset to weight 1 and the one-hot background label.

        Args:
            boxes: (R_i, 4) sampled regions of each image.
            classes: (R_i,) int64 in [0, K], K for background.
            matched: (R_i,) row of that image's targets; anything in an image without targets.
            targets: one (M_i,) an image, M_i = 0 allowed.
            num_classes: K.
        """
        pairs = zip(targets, matched, strict=True)
        rows = Targets.cat([t[m] if len(t) else _zeros(t, len(m)) for t, m in pairs])
        flat_classes = torch.cat(classes)
        background = flat_classes == num_classes
        one_hot = F.one_hot(flat_classes, num_classes + 1).to(rows.probs)
        return cls(
            boxes=boxes,
            classes=flat_classes,
            matched=torch.cat(matched),
            gt_boxes=rows.boxes,
            weights=rows.weights.masked_fill(background, 1.0),
            box_weights=rows.box_weights.masked_fill(background, 1.0),
            probs=torch.where(background[:, None], one_hot, rows.probs),
        )


def _zeros(like: Targets, count: int) -> Targets:
    """Rows for background regions of an image without boxes."""
    return Targets(*(value.new_zeros(count, *value.shape[1:]) for value in vars(like).values()))


@dataclass
class RegionOutput(RowFields):
    """
    Head outputs for R regions of all images; R = 0 is allowed.

    Attributes:
        logits: (R, K + 1), background last.
        deltas: (R, K, 4) class-specific or (R, 1, 4) class-agnostic box offsets.
        embeddings: (R, D) features the two predictors read.
    """

    logits: Tensor
    deltas: Tensor
    embeddings: Tensor
