"""
Strong views of unlabeled images mixed with each other, and their pseudo-boxes with them.

MixPL, mixed pseudo-labels (https://arxiv.org/abs/2312.07006).

Shape shorthand: N images of a pass, R boxes of one image, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from ssod.core.distributed import step_generator
from ssod.core.filters import kept_rows
from ssod.core.geometry import map_boxes, transfer_boxes, view_matrix
from ssod.core.interfaces import BOX_LOSSES, RegionDetector
from ssod.core.method import METHOD_REGISTRY, Method, Step
from ssod.core.structures import Layer, PseudoLabels, Views
from ssod.errors import InputError

Size = tuple[int, int]
T = TypeVar("T")

MIXUP_SALT = 0x6D69_7875_7035_3B2F
MOSAIC_SALT = 0x6D6F_7361_6963_5D91
MOSAIC_IMAGES = 4
# Of the longest side of the pass: MixPL draws from 400 to 800 where images have up to 1333 pixels.
MOSAIC_RANGE = (0.3, 0.6)
MAIN_LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg")


@METHOD_REGISTRY.register()
class MixPL(Method):
    """
    Pseudo-mixup and pseudo-mosaic of strong views.

    MixPL (https://arxiv.org/abs/2312.07006). Mixup replaces each strong view by the mean of it and
    of another one of the pass, with the pseudo-boxes of both: what the teacher misses in one is no
    clear background then. The mosaic is one more image a pass, of four of its strong views in a
    smaller size: objects of which the teacher finds the large ones are learned small.

    Differs from the published code: images are mixed with others of the same pass and process
    rather than with those of earlier iterations, so that nothing is remembered; the mosaic is of
    the first four; partners are not erased anew.

    Args:
        student: tells the color that images are padded with.
        mixup: whether strong views are mixed.
        mosaic_weight: factor on the losses of the mosaic; 0 for none.
        unsup_box_losses: whether coordinates are learned from pseudo-boxes.
        unlabeled_per_pass: N, of one process; None if unlabeled images are not used.

    Raises:
        InputError: if an argument is out of range, or N is too small.
    """

    group = "MIXPL"
    mean_color: Tensor

    def __init__(
        self,
        student: RegionDetector,
        *,
        mixup: bool = True,
        mosaic_weight: float = 0.5,
        unsup_box_losses: bool = False,
        unlabeled_per_pass: int | None,
    ):
        super().__init__()
        if not mosaic_weight >= 0:
            raise InputError(f"SSOD.MIXPL.MOSAIC_WEIGHT must be at least 0, got {mosaic_weight}")
        needed = MOSAIC_IMAGES if mosaic_weight else 2 if mixup else 0
        if unlabeled_per_pass is not None and unlabeled_per_pass < needed:
            raise InputError(
                f"SSOD.MIXPL mixes images of one pass of one process and needs {needed} unlabeled "
                f"ones there, got {unlabeled_per_pass}; raise SSOD.DATA.UNLABELED_PER_BATCH, lower "
                "SSOD.ACCUMULATE_STEPS, or set SSOD.MIXPL.MOSAIC_WEIGHT 0, with which 2 are enough"
            )
        self.register_buffer("mean_color", student.mean_color.float().clone(), persistent=False)
        self.mixup = mixup
        self.mosaic_weight = mosaic_weight
        left_out = () if unsup_box_losses else BOX_LOSSES
        self.mosaic_losses = [name for name in MAIN_LOSSES if name not in left_out]

    @torch.no_grad()
    def mix(
        self, views: Views, pseudo_labels: list[PseudoLabels]
    ) -> tuple[Views, list[PseudoLabels]]:
        """
        Mix each strong view with the one before it, the first with the last.

        What they are afterwards is said by two layers alone, no longer by `to_strong` and `erased`.
        """
        if not self.mixup:
            return views, pseudo_labels
        (layer,) = views.layers
        generator = step_generator(MIXUP_SALT)
        largest = _bounds(_size(image) for image in views.strong)
        own = [Part(image.float(), view_matrix(1.0, 1.0)) for image in views.strong]
        partners = [_fitted(image, largest) for image in _rolled(views.strong)]
        strong = []
        for parts in zip(own, partners, strict=True):
            size = _bounds(_size(part.pixels) for part in parts)
            for part in parts:
                room = zip(size, _size(part.pixels), strict=True)
                part.y, part.x = (_draw(0, whole - side + 1, generator) for whole, side in room)
            strong.append(self.paint(size, parts, 0.5))
        to_own, to_partner = _matrices([*own, *partners], strong[0].device).chunk(2)
        layers = [_seen_through(layer, to_own), _seen_through(_rolled_layer(layer), to_partner)]
        labels = [
            PseudoLabels.cat(both)
            for both in zip(
                _moved(pseudo_labels, to_own, strong, 0),
                _moved(_rolled(pseudo_labels), to_partner, strong, 1),
                strict=True,
            )
        ]
        return replace(views, strong=strong, mixed=layers, to_strong=None, erased=[]), labels

    def losses(self, step: Step) -> dict[str, Tensor]:
        """
        Return the student's losses of the mosaic, `loss_cls_mosaic`, `loss_rpn_cls_mosaic`, ...

        Batch norms use their running statistics in it, and do not update them. Without a box to
        learn, all four images being empty, they are zeros connected to the graph.
        """
        if not self.mosaic_weight:
            return {}
        assert step.unmixed is not None and step.main is not None, "after the main branch"
        image, labels, is_learned = self.mosaic(
            step.unmixed, step.unmixed_labels, step.drops_undecided
        )
        if is_learned:
            with step.student.fixed_norm_statistics():
                batch = step.student.preprocess([image])
                targets = [labels.to_targets()]
                found = step.student.losses(step.student.features(batch), batch, targets).losses
        else:
            found = {name: 0.0 * loss for name, loss in step.main.losses.items()}
        return {f"{name}_mosaic": self.mosaic_weight * found[name] for name in self.mosaic_losses}

    @torch.no_grad()
    def mosaic(
        self, views: Views, pseudo_labels: list[PseudoLabels], drops_undecided: bool
    ) -> tuple[Tensor, PseudoLabels, bool]:
        """
        Put the first four strong views around a common corner, each flipped and made smaller.

        Args:
            views: of N >= 4 images, not mixed.
            pseudo_labels: of each strong view.
            drops_undecided: whether boxes that are not `reliable` go.

        Returns:
            uint8 (3, h, w), its pseudo-labels, of which those smaller than a pixel went, and
            whether any of them has a weight.
        """
        images, labels = views.strong[:MOSAIC_IMAGES], pseudo_labels[:MOSAIC_IMAGES]
        generator = step_generator(MOSAIC_SALT)
        longest = max(side for image in images for side in _size(image))
        low, high = (max(round(share * longest), 1) for share in MOSAIC_RANGE)
        cell = (_draw(low, high + 1, generator), _draw(low, high + 1, generator))
        parts = [_fitted(image, cell) for image in images]
        center_y, center_x = _bounds(_size(part.pixels) for part in parts)
        for index, part in enumerate(parts):
            height, width = _size(part.pixels)
            part.y = center_y - (height if index < 2 else 0)
            part.x = center_x - (0 if index % 2 else width)
        image = self.paint((2 * center_y, 2 * center_x), parts, 1.0)
        moved, masks = [], []
        for label, matrix in zip(labels, _matrices(parts, image.device), strict=True):
            none = label.boxes.new_zeros(0, 4)
            boxes, is_visible = transfer_boxes(label.boxes, matrix, _size(image), none)
            moved.append(replace(label, boxes=boxes))
            masks.append(is_visible & (label.reliable | (not drops_undecided)))
        all_labels, kept = PseudoLabels.cat(moved), torch.cat(masks)
        rows, learned = kept_rows([kept, kept & (all_labels.weights > 0)])
        return image, all_labels[rows], len(learned) > 0

    def paint(self, size: Size, parts: Iterable[Part], share: float) -> Tensor:
        """
        Add a share of each part to a canvas of the mean color, so that the rest is neutral.

        Returns:
            uint8 (3, *size).
        """
        color = self.mean_color[:, None, None]
        canvas = color.repeat(1, *size)
        for part in parts:
            height, width = _size(part.pixels)
            place = canvas[:, part.y : part.y + height, part.x : part.x + width]
            place += share * (part.pixels - color)
        return canvas.round_().clamp_(0, 255).to(torch.uint8)


@dataclass
class Part:
    """
    A strong view on its way into a mixed one.

    Attributes:
        pixels: (3, h, w) float.
        matrix: (3, 3) from the strong view to `pixels`.
        x: of its left side in the mixed view.
        y: of its top.
    """

    pixels: Tensor
    matrix: Tensor
    x: int = 0
    y: int = 0


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _bounds(sizes: Iterable[Size]) -> Size:
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def _draw(low: int, end: int, generator: torch.Generator) -> int:
    """Return one of low, ..., end - 1; on the CPU, so nothing waits."""
    return int(torch.randint(low, end, (), generator=generator))


def _rolled(items: list[T]) -> list[T]:
    """Each row's partner: the one before it."""
    return [*items[-1:], *items[:-1]]


def _rolled_layer(layer: Layer) -> Layer:
    matrices = layer.matrices
    return Layer(_rolled(layer.images), None if matrices is None else matrices.roll(1, 0))


def _fitted(image: Tensor, size: Size) -> Part:
    """Resize an image to the largest that fits, of its own aspect ratio, and flip it."""
    height, width = _size(image)
    scale = min(size[0] / height, size[1] / width)
    new = max(round(height * scale), 1), max(round(width * scale), 1)
    pixels = image.float()
    if new != (height, width):
        pixels = F.interpolate(pixels[None], new, mode="bilinear", antialias=True)[0]
    matrix = view_matrix(new[1] / width, new[0] / height, flip_width=new[1])
    return Part(pixels.flip(-1), matrix)


def _matrices(parts: Sequence[Part], device: torch.device) -> Tensor:
    """From the strong views to the places of their parts, (S, 3, 3), in one copy to the device."""
    matrices = torch.stack([part.matrix for part in parts])
    matrices[:, :2, 2] += torch.tensor([[part.x, part.y] for part in parts], dtype=torch.float64)
    return matrices.to(device, non_blocking=True)


def _seen_through(layer: Layer, matrices: Tensor) -> Layer:
    before = layer.matrices
    return Layer(layer.images, matrices if before is None else matrices @ before.to(matrices))


def _moved(
    labels: list[PseudoLabels], matrices: Tensor, images: list[Tensor], layer: int
) -> list[PseudoLabels]:
    return [
        replace(
            label,
            boxes=clip_boxes_to_image(map_boxes(label.boxes, matrix), _size(image)),
            layer=torch.full_like(label.layer, layer),
        )
        for label, matrix, image in zip(labels, matrices, images, strict=True)
    ]
