"""
Background that the teacher doubts, and coordinates that it is sure of.

Soft Teacher (https://arxiv.org/abs/2106.09018).

Shape shorthand: S strong views, L layers of them, R regions of all views, M pseudo-boxes of one
view, C copies of a box, K foreground classes (background is index K).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.ops import box_area

from ssod.core.distributed import step_generator
from ssod.core.method import METHOD_REGISTRY, Method, Step, Undecided, choose_layer
from ssod.core.structures import Layer, PseudoLabels, RegionOutput, RegionSamples

SALT = 0x5DEECE66D  # of the jitter's draws


def relative_spread(copies: Tensor) -> Tensor:
    """
    Return how far copies of boxes are apart, in sides of their mean.

    Box jittering of Soft Teacher (https://arxiv.org/abs/2106.09018): the standard deviation of each
    coordinate, divided by the width or height of the mean box, averaged over the coordinates. The
    published code; the paper divides by half the sum of width and height.

    Args:
        copies: (C, R, 4) XYXY pixels, C at least 2, R = 0 allowed.

    Returns:
        (R,); sides below 1 pixel count as 1.
    """
    mean = copies.mean(0)
    sides = (mean[:, 2:] - mean[:, :2]).clamp(min=1)
    variance = (copies - mean).square().sum(0) / (len(copies) - 1)
    return (variance.sqrt() / sides.repeat(1, 2)).mean(1)


@METHOD_REGISTRY.register()
class SoftTeacher(Method):
    """
    Weighs background by the teacher's word, and chooses boxes whose coordinates are learned.

    Soft Teacher (https://arxiv.org/abs/2106.09018), in training only. Regions that are background
    to the main branch weigh what the teacher's box head gives the background in the same region of
    the weak view, rescored by the other methods; where views are mixed, the product over those that
    the region shows. The classification loss is divided by the sum of the weights then, not by the
    number of regions. Coordinates are learned from boxes that the teacher regresses alike from
    jittered copies, whatever their score: of undecided boxes as well, which the classification loss
    ignores. The jitter's draws are its own.

    Differs from the published code: classes and coordinates are learned in one sample of regions;
    boxes below the main threshold are ignored, where published they are background of a low weight.

    Args:
        background: whether to weigh background.
        jitter: whether to choose boxes for their coordinates.
        unsup_box_losses: whether coordinates are learned from pseudo-boxes at all; without, boxes
            are not jittered.
        max_spread: of boxes that are learned, in sides of the box.
        copies: of each box.
        offset: standard deviation of a coordinate's jitter, in sides of the box.
    """

    group = "SOFT_TEACHER"
    undecided: Undecided = "main"

    def __init__(
        self,
        *,
        background: bool = True,
        jitter: bool = True,
        unsup_box_losses: bool = False,
        max_spread: float = 0.02,
        copies: int = 10,
        offset: float = 0.06,
    ):
        super().__init__()
        self.background = background
        self.jitter = jitter and unsup_box_losses
        if not self.jitter:
            self.undecided = ""  # nothing is learned of such boxes
        self.max_spread = max_spread
        self.copies = copies
        self.offset = offset

    @torch.no_grad()
    def reweight(self, step: Step, samples: RegionSamples, regions: RegionOutput) -> RegionSamples:
        """Weigh background regions, and the coordinates of the others."""
        if self.background:
            samples = _weigh_background(step, samples)
        if self.jitter:
            stable = self._stable(step)
            step.shared["SoftTeacher.stable"] = torch.cat(stable)
            is_object = samples.classes < samples.probs.shape[1] - 1
            undecided = samples.look_up([~labels.reliable for labels in step.learned])
            box_weights = samples.box_weights.masked_fill(undecided, 1)
            box_weights = box_weights.masked_fill(is_object & ~samples.look_up(stable), 0)
            samples = replace(samples, box_weights=box_weights)
        return samples

    def metrics(self, step: Step) -> dict[str, Tensor]:
        """Return the mean weight of background regions, and stable boxes an image."""
        found = {}
        if "SoftTeacher.background" in step.shared:
            found["pseudo/background_weight"] = step.shared["SoftTeacher.background"]
        if "SoftTeacher.stable" in step.shared:
            found["pseudo/stable_per_image"] = step.per_image(step.shared["SoftTeacher.stable"])
        return found

    def _stable(self, step: Step) -> list[Tensor]:
        """Return (M,) bool of each strong view: which boxes the teacher finds again and again."""
        assert step.unlabeled is not None, "there are unlabeled images"
        counts = [len(labels) for labels in step.learned]
        all_labels = PseudoLabels.cat(step.learned)
        boxes = all_labels.found
        noise = torch.randn(len(boxes), self.copies, 4, generator=step_generator(SALT))
        noise = noise.to(boxes, non_blocking=True)
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        copies = boxes[:, None] + self.offset * sides[:, None] * noise
        # All boxes in each layer, and then each in its own: the host need not know which are where.
        spread = [
            relative_spread(_refine(step, layer, all_labels.classes, copies, counts))
            for layer in step.unlabeled.layers
        ]
        own = choose_layer(spread, all_labels.layer)
        return list((own < self.max_spread).split(counts))


def _weigh_background(step: Step, samples: RegionSamples) -> RegionSamples:
    assert step.unlabeled is not None, "there are unlabeled images"
    background = samples.classes == samples.probs.shape[1] - 1
    weights = samples.weights
    for layer in step.unlabeled.layers:
        boxes = step.weak_boxes(layer, samples.boxes)
        output = step.ask_teacher(layer, boxes)
        probs = step.rescore(output.logits.softmax(1), output.embeddings)
        # What is outside the weak view says nothing.
        counts = background & (box_area(torch.cat(boxes)) > 0)
        weights = torch.where(counts, weights * probs[:, -1], weights)
    total = (weights * background).sum() / background.sum().clamp(min=1)
    step.shared["SoftTeacher.background"] = total
    # The region losses divide by the number of regions.
    return replace(samples, weights=weights * (len(weights) / weights.sum().clamp(min=1)))


def _refine(step: Step, layer: Layer, classes: Tensor, copies: Tensor, counts: list[int]) -> Tensor:
    """
    Let the teacher regress copies of boxes of the weak views that a layer shows.

    Args:
        step: of the iteration.
        layer: of the strong views.
        classes: (R,) of the boxes.
        copies: (R, C, 4) in pixels of the weak views.
        counts: boxes of each strong view.

    Returns:
        (C, R, 4) boxes of those classes, clipped to the weak views.
    """
    parts = [part.flatten(0, 1) for part in copies.split(counts)]
    deltas = step.ask_teacher(layer, parts).deltas
    refined = step.regress(layer, parts, deltas, classes.repeat_interleave(copies.shape[1]))
    return torch.cat(refined).reshape(copies.shape).transpose(0, 1)
