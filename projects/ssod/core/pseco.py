"""
Regions that learn a pseudo-box, chosen by the teacher, and its coordinates, weighed by the student.

PseCo (https://arxiv.org/abs/2203.16317).

Shape shorthand: L layers of the strong views, R regions of all views, P regions and M pseudo-boxes
of one view, K foreground classes (background is index K).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_iou

from ssod.core.method import METHOD_REGISTRY, Method, Step, choose_layer
from ssod.core.structures import Layer, RegionOutput, RegionSamples

EPS = 1e-6  # a sum of IoUs that is a whole number is not below it for its rounding


def prediction_guided_assignment(
    ious: Tensor, scores: Tensor, min_iou: float = 0.4, num_ious: int = 12
) -> Tensor:
    """
    Return which pseudo-box each region of an image learns.

    Prediction-guided label assignment of PseCo (https://arxiv.org/abs/2203.16317), with the
    published code's numbers. The candidates of a box are the regions that overlap it most, and
    enough; the best k of them by sqrt(IoU * score) learn it, the first one of equals. k is the sum
    of the largest IoUs, rounded down, and at least 1.

    Args:
        ious: (M, P) of the boxes with the teacher's regressed regions; 0 for regions that must not
            be objects. M = 0 and P = 0 are allowed.
        scores: (M, P) the teacher's probabilities of the boxes' classes in the regions.
        min_iou: of candidates.
        num_ious: largest IoUs that are added.

    Returns:
        (P,) int64 row of the box, M for none. What is not a number counts as 0.
    """
    num_boxes, num_regions = ious.shape
    if not num_boxes:
        return torch.zeros(num_regions, dtype=torch.int64, device=ious.device)
    ious, scores = ious.double().nan_to_num(), scores.double().nan_to_num()
    best, row = ious.max(0)
    is_own = row == torch.arange(num_boxes, device=row.device)[:, None]
    candidates = is_own & (best >= min_iou)
    ious = ious * candidates
    largest = ious.sort(1, descending=True).values[:, :num_ious]
    count = (largest.sum(1) + EPS).floor().clamp(min=1)
    quality = (ious * scores).sqrt().masked_fill(~candidates, -1)
    rank = quality.argsort(dim=1, descending=True, stable=True).argsort(1)
    chosen = candidates & (rank < count[:, None])
    return row.masked_fill(~chosen.any(0), num_boxes)


def mean_iou_of_box(ious: Tensor, rows: Tensor, num_boxes: int) -> Tensor:
    """
    Return the mean IoU of all regions that learn the same box.

    Positive-proposal consistency voting of PseCo (https://arxiv.org/abs/2203.16317).

    Args:
        ious: (P,) of the student's regressed regions with their boxes.
        rows: (P,) int64 in [0, num_boxes], the box of each region; num_boxes for none.
        num_boxes: M, maybe 0.

    Returns:
        (P,); 0 for regions of no box. What is not a number counts as 0.
    """
    member = (rows == torch.arange(num_boxes, device=rows.device)[:, None]).double()
    means = member @ ious.double().nan_to_num() / member.sum(1).clamp(min=1)
    return (means @ member).to(ious)


@METHOD_REGISTRY.register()
class PseCo(Method):
    """
    Prediction-guided assignment and consistency voting, in training only.

    PseCo (https://arxiv.org/abs/2203.16317). Assignment: of the regions that were sampled, those
    learn a pseudo-box from which the teacher, in the weak view, finds it best; the others are
    background. Voting: the coordinates of a box weigh u^2, where u is the mean IoU with it of the
    student's regressed regions, times sum(u) / sum(u^2) over all regions of objects.

    Regions of boxes of weight 0, and these boxes, take no part in the assignment: they stay
    ignored.

    Differs from the published code: regions are the student's, matched and sampled by the host,
    pseudo-boxes among them; there they are the teacher's proposals, sampled after the assignment.

    Args:
        assignment: whether regions are assigned.
        voting: whether coordinates are weighed.
        unsup_box_losses: whether coordinates are learned from pseudo-boxes at all; without, there
            is no voting.
        min_iou: of candidates, as `prediction_guided_assignment`.
        num_ious: likewise.
    """

    group = "PSECO"

    def __init__(
        self,
        *,
        assignment: bool = True,
        voting: bool = True,
        unsup_box_losses: bool = False,
        min_iou: float = 0.4,
        num_ious: int = 12,
    ):
        super().__init__()
        self.assignment = assignment
        self.voting = voting and unsup_box_losses
        self.min_iou = min_iou
        self.num_ious = num_ious

    @torch.no_grad()
    def reweight(self, step: Step, samples: RegionSamples, regions: RegionOutput) -> RegionSamples:
        """Assign the regions anew, and weigh the coordinates of objects."""
        if self.assignment:
            samples = self._assign(step, samples)
            objects = samples.weights * (samples.classes < samples.probs.shape[1] - 1)
            step.shared["PseCo.objects"] = step.per_image(objects > 0)
        if self.voting:
            samples = _vote(step, samples, regions)
        return samples

    def metrics(self, step: Step) -> dict[str, Tensor]:
        """Return regions that learn an object, an image, and the mean u of regions."""
        names = {"objects": "pseudo/object_regions_per_image", "u": "pseudo/box_consistency"}
        return {
            name: step.shared[f"PseCo.{key}"]
            for key, name in names.items()
            if f"PseCo.{key}" in step.shared
        }

    def _assign(self, step: Step, samples: RegionSamples) -> RegionSamples:
        assert step.unlabeled is not None, "there are unlabeled images"
        num_classes = samples.probs.shape[1] - 1
        ignored = (samples.classes < num_classes) & (samples.weights == 0)
        counts = [len(boxes) for boxes in samples.boxes]
        asked = [_ask(step, layer, samples.boxes) for layer in step.unlabeled.layers]
        # With what methods have decided of the main branch's targets since.
        labels = step.learned if step.drops_undecided else step.pseudo_labels
        rows, classes = [], []
        for i, (own, boxes, ignore) in enumerate(
            zip(labels, samples.boxes, ignored.split(counts), strict=True)
        ):
            overlaps = choose_layer([box_iou(own.found, m[i]) for m, _ in asked], own.layer)
            scores = choose_layer([p[i][:, own.classes].T for _, p in asked], own.layer)
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
            takes_part = (has_area & ~ignore) & (own.weights > 0)[:, None]
            row = prediction_guided_assignment(
                overlaps * takes_part, scores, self.min_iou, self.num_ious
            )
            classes.append(F.pad(own.classes, (0, 1), value=num_classes)[row])
            rows.append(row.clamp(max=max(len(own) - 1, 0)))
        targets = [own.to_targets() for own in labels]
        new = RegionSamples.from_matches(samples.boxes, classes, rows, targets, num_classes)
        return _keep(samples, ignored, new)


def _ask(
    step: Step, layer: Layer, regions: list[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """
    Let the teacher score and move regions of strong views in the weak ones.

    Returns:
        (P, 4) boxes in pixels of the weak view, by the likeliest class, and (P, K + 1)
        probabilities, of each strong view.
    """
    weak = step.weak_boxes(layer, regions)
    output = step.ask_teacher(layer, weak)
    probs = step.rescore(output.logits.softmax(1), output.embeddings)
    refined = step.regress(layer, weak, output.deltas, probs[:, :-1].argmax(1))
    return refined, probs.split([len(boxes) for boxes in regions])


def _keep(old: RegionSamples, kept: Tensor, new: RegionSamples) -> RegionSamples:
    """Return new samples, with the old ones in the rows that are kept, (R,) bool."""
    changed: dict[str, Any] = {}
    for name in ("classes", "matched", "gt_boxes", "weights", "box_weights", "probs"):
        before, after = getattr(old, name), getattr(new, name)
        mask = kept if before.ndim == 1 else kept[:, None]
        changed[name] = torch.where(mask, before, after)
    return replace(new, **changed)


def _vote(step: Step, samples: RegionSamples, regions: RegionOutput) -> RegionSamples:
    is_object = samples.classes < samples.probs.shape[1] - 1
    foreground = samples.classes.clamp(max=samples.probs.shape[1] - 2)
    boxes = torch.cat(samples.boxes)
    moved = step.student.regress(boxes, regions.deltas, foreground)
    counts = [len(own) for own in samples.boxes]
    per_view = (_paired_iou(moved, samples.gt_boxes), samples.matched, is_object)
    u = torch.cat(
        [
            mean_iou_of_box(ious, rows.masked_fill(~objects, len(own)), len(own))
            for ious, rows, objects, own in zip(
                *(values.split(counts) for values in per_view), step.learned, strict=True
            )
        ]
    )
    before = samples.box_weights * is_object
    total = (before * u).sum()
    step.shared["PseCo.u"] = total / before.sum().clamp(min=EPS)
    voted = samples.box_weights * u**2 * total / (before * u**2).sum().clamp(min=EPS)
    return replace(samples, box_weights=torch.where(is_object, voted, samples.box_weights))


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the (R,) IoU of (R, 4) boxes with (R, 4) others, row by row."""
    shared = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return shared / (box_area(a) + box_area(b) - shared).clamp(min=EPS)
