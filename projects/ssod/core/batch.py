"""
Images and what they are trained with: containers that the data makes and the algorithms read.

Shape shorthand: N images of a batch, M boxes of one image, K foreground classes. Boxes are
absolute XYXY pixels of their image; the background is class K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor


def _change(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in fields, lists and tuples; anything else stays as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_change(item, change) for item in value)
    if isinstance(value, TensorFields):
        return replace(
            value, **{f.name: _change(getattr(value, f.name), change) for f in fields(value)}
        )
    return value


@dataclass
class TensorFields:
    """Dataclass whose tensors, also those inside lists, move between devices together."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy with `Tensor.to(*args, **kwargs)` applied to every tensor."""
        return _change(self, lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory: the hook of `DataLoader(pin_memory=True)`."""
        return _change(self, Tensor.pin_memory)


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
        """Select images by a slice, maybe none; the padding stays."""
        return ImageBatch(self.tensor[index], self.sizes[index])

    def half(self, divisor: int = 32) -> ImageBatch:
        """
        Return the batch at half the size, zero-padded to a multiple of `divisor`; N = 0 is allowed.

        Each pixel is the mean of 2 x 2: geometry scales by exactly 1/2. Odd sizes are rounded up.
        """
        height, width = self.tensor.shape[-2:]
        even = F.pad(self.tensor, (0, width % 2, 0, height % 2))
        small = F.interpolate(even, scale_factor=0.5, mode="bilinear", align_corners=False)
        height, width = small.shape[-2:]
        small = F.pad(small, (0, -width % divisor, 0, -height % divisor))
        return ImageBatch(small, [((h + 1) // 2, (w + 1) // 2) for h, w in self.sizes])


@dataclass
class Layer(TensorFields):
    """
    What S strong views show: one weak view each, in pixels that a matrix relates.

    Attributes:
        images: row of the weak view that each strong view shows.
        matrices: (S, 3, 3) from its pixels to those of the strong view; None if they are the same.
    """

    images: list[int]
    matrices: Tensor | None = None


@dataclass
class Views(TensorFields):
    """
    A batch of images in two augmentations.

    They have the same geometry, so that boxes hold for both, unless there is `to_strong`.

    Attributes:
        weak: N uint8 RGB (3, h, w) tensors: resized and maybe flipped.
        strong: the same after the photometric recipe. Empty if not learned.
        targets: (M_i,) ground truth in pixels of the weak views, None for unlabeled images.
        image_ids: where each image came from, for messages and pictures.
        second_strong: of the weak views' pixels, drawn independently. Empty unless a method asks
            for it.
        to_strong: (N, 3, 3) from pixels of the weak to those of the strong views, None if they are
            the same, or they are mixed.
        strong_targets: those of `targets` that are left in the strong views, in pixels of these;
            None if they are the same.
        erased: (E_i, 4) erased rectangles of strong views, empty if `to_strong` is None.
        mixed: layers of the strong views where the i-th one does not show the i-th weak view alone.
    """

    weak: list[Tensor]
    strong: list[Tensor]
    targets: list[Targets] | None
    image_ids: list[int | str]
    second_strong: list[Tensor] = field(default_factory=list)
    to_strong: Tensor | None = None
    strong_targets: list[Targets] | None = None
    erased: list[Tensor] = field(default_factory=list)
    mixed: list[Layer] = field(default_factory=list)

    @property
    def layers(self) -> list[Layer]:
        """What the strong views show; several layers if images were mixed."""
        return self.mixed or [Layer(list(range(len(self))), self.to_strong)]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: slice) -> Views:
        """Select images by a slice, maybe none, before they are mixed."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        parts: dict[str, Any] = {name: None if v is None else v[index] for name, v in values}
        return Views(**parts)

    def split(self, parts: int) -> list[Views]:
        """Divide the images into equal parts, in order; ValueError if that is not possible."""
        if len(self) % parts:
            raise ValueError(f"{len(self)} images cannot be divided into {parts} equal parts")
        size = len(self) // parts
        return [self[start * size : (start + 1) * size] for start in range(parts)]


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

    def split(self, parts: int) -> list[TwoStreamBatch]:
        """
        Divide both streams into equal parts, in order, which do without `failed` and `file_names`.

        Raises:
            ValueError: if the number of images of a stream is no multiple of `parts`.
        """
        labeled = self.labeled.split(parts)
        unlabeled = self.unlabeled.split(parts) if self.unlabeled else [None] * parts
        return [TwoStreamBatch(*streams, []) for streams in zip(labeled, unlabeled, strict=True)]
