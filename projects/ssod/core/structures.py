"""
Containers that travel between the hosts, the data and the algorithms.

Shape shorthand in this package: N images of a batch, M boxes of one image, R regions or
detections (of all images unless said otherwise), K foreground classes, D embedding size.
Boxes are absolute XYXY pixels of the image they were found in; the background is class K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "nearest"]


def _move(value: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(value, (Tensor, TensorFields)):
        return value.to(*args, **kwargs)
    if isinstance(value, (list, tuple)):
        return type(value)(_move(item, *args, **kwargs) for item in value)
    return value


@dataclass
class TensorFields:
    """Dataclass whose tensors, also those inside lists, move between devices together."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy with `Tensor.to(*args, **kwargs)` applied to every tensor."""
        moved = {f.name: _move(getattr(self, f.name), *args, **kwargs) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory: the hook of `DataLoader(pin_memory=True)`."""

        def pin(value: Any) -> Any:
            if isinstance(value, (Tensor, TensorFields)):
                return value.pin_memory()
            if isinstance(value, list):
                return [pin(item) for item in value]
            return value

        return replace(self, **{f.name: pin(getattr(self, f.name)) for f in fields(self)})


@dataclass
class RowFields(TensorFields):
    """Fields that all have the same number of rows: indexing and `cat` work on each of them."""

    def __post_init__(self) -> None:
        rows = {f.name: len(getattr(self, f.name)) for f in fields(self)}
        if len(set(rows.values())) > 1:
            raise ValueError(f"{type(self).__name__} needs as many rows in every field, got {rows}")

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: Tensor | slice) -> Self:
        """Select rows of every field by a slice, a boolean mask (rows,) or an index tensor."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def cat(cls, items: Sequence[Self]) -> Self:
        """Concatenate the rows of one or more containers. Raises ValueError for none."""
        if not items:
            raise ValueError(f"{cls.__name__}.cat needs at least one item, got none")
        return cls(*(torch.cat([getattr(i, f.name) for i in items]) for f in fields(cls)))


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
        boxes: (R, 4) pixels of the unlabeled image's views.
        classes: (R,) int64 in [0, K).
        scores: (R,) in [0, 1].
        weights: (R,) factor on the classification loss of regions matched to the box.
        box_weights: (R,) the same for their box regression loss.
        class_probs: (R, K + 1) teacher distribution.
        reliable: (R,) bool, False for boxes that a filter kept but left undecided.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    weights: Tensor
    box_weights: Tensor
    class_probs: Tensor
    reliable: Tensor

    def to_targets(self) -> Targets:
        """Hard-label training targets with this container's weights."""
        probs = F.one_hot(self.classes, self.class_probs.shape[1]).to(self.class_probs)
        return Targets(self.boxes, self.classes, self.weights, self.box_weights, probs)


@dataclass
class Targets(RowFields):
    """
    Boxes one image is trained with; every field is always filled.

    Attributes:
        boxes: (M, 4) pixels of the image the student sees.
        classes: (M,) int64 in [0, K).
        weights: (M,) factor on the classification loss of matched regions.
        box_weights: (M,) factor on their box regression loss.
        probs: (M, K + 1) soft label, background last.
    """

    boxes: Tensor
    classes: Tensor
    weights: Tensor
    box_weights: Tensor
    probs: Tensor

    @classmethod
    def from_ground_truth(cls, boxes: Tensor, classes: Tensor, num_classes: int) -> Targets:
        """
        Targets of weight 1 with one-hot labels.

        Args:
            boxes: (M, 4), M = 0 allowed.
            classes: (M,) int64 in [0, num_classes).
            num_classes: K.

        Raises:
            ValueError: if a class is outside [0, num_classes).
        """
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(
                f"classes must be in [0, {num_classes}), "
                f"got [{int(classes.min())}, {int(classes.max())}]"
            )
        ones = boxes.new_ones(len(boxes))
        return cls(boxes, classes, ones, ones, F.one_hot(classes, num_classes + 1).to(boxes))


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
        Look the weights and soft labels of sampled regions up in the targets.

        Background regions inherit the nearest target's row from the hosts' matchers, so they are
        reset to weight 1 and the one-hot background label.

        Args:
            boxes: (R_i, 4) sampled regions of each image.
            classes: (R_i,) int64 in [0, K], K for background.
            matched: (R_i,) row of that image's targets; anything in an image without targets.
            targets: one an image.
            num_classes: K.
        """
        rows = Targets.cat(
            [
                t[m] if len(t) else _no_targets(t, len(m))
                for t, m in zip(targets, matched, strict=True)
            ]
        )
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


def _no_targets(like: Targets, count: int) -> Targets:
    """Rows for background regions of an image without boxes."""
    return Targets(
        like.boxes.new_zeros(count, 4),
        like.classes.new_zeros(count),
        like.weights.new_ones(count),
        like.box_weights.new_ones(count),
        like.probs.new_zeros(count, like.probs.shape[1]),
    )


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


@dataclass
class ImageBatch(TensorFields):
    """
    Normalised images, padded at the right and bottom to one size.

    Attributes:
        tensor: (N, 3, H, W).
        sizes: (height, width) of each image without padding.
    """

    tensor: Tensor
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: slice) -> ImageBatch:
        """Select images by a slice; the padding stays."""
        return ImageBatch(self.tensor[index], self.sizes[index])

    def half(self, divisor: int = 32, mode: Interpolation = "bilinear") -> ImageBatch:
        """
        Return the batch at half the size, zero-padded to a multiple of `divisor`.

        "bilinear" without aligned corners is the mean of 2 x 2 pixels at this factor: geometry
        scales by exactly 1/2. "nearest" keeps every other pixel. Odd sizes are rounded up.
        """
        height, width = self.tensor.shape[-2:]
        even = F.pad(self.tensor, (0, width % 2, 0, height % 2))
        align_corners = False if mode == "bilinear" else None
        small = F.interpolate(even, scale_factor=0.5, mode=mode, align_corners=align_corners)
        height, width = small.shape[-2:]
        small = F.pad(small, (0, -width % divisor, 0, -height % divisor))
        return ImageBatch(small, [((h + 1) // 2, (w + 1) // 2) for h, w in self.sizes])


@dataclass
class Views(TensorFields):
    """
    A batch of images in two augmentations of the same geometry.

    Attributes:
        weak: uint8 RGB (3, h, w) tensors: resized and maybe flipped.
        strong: the same pixels after the photometric recipe, so boxes hold for both.
        targets: ground truth in pixels of the views, None for unlabeled images.
        image_ids: where each image came from, for messages and pictures.
    """

    weak: list[Tensor]
    strong: list[Tensor]
    targets: list[Targets] | None
    image_ids: list[int | str]

    def __len__(self) -> int:
        return len(self.weak)


@dataclass
class TwoStreamBatch(TensorFields):
    """
    One training iteration's images on one rank.

    Attributes:
        labeled: with targets.
        unlabeled: without, None while the iteration uses no unlabeled image.
        failed: files that could not be decoded and were replaced while making this batch.
        file_names: of the images, labeled ones first, for messages.
    """

    labeled: Views
    unlabeled: Views | None
    failed: list[str]
    file_names: list[str] = field(default_factory=list)
