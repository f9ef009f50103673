"""
What is learned from boxes that a filter is undecided about.

LabelMatch (https://arxiv.org/abs/2206.06608): proposal self-assignment and reliable pseudo-label
mining. Its thresholds are in `ssod.core.adaptive_threshold`.

Shape shorthand: R regions of all images, B pseudo-boxes of all images, K foreground classes
(background is index K).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from ssod.core.filters import kept_rows
from ssod.core.interfaces import Candidates, RegionDetector
from ssod.core.method import METHOD_REGISTRY, Method, Step, choose_layer
from ssod.core.structures import PseudoLabels, RegionOutput, RegionSamples
from ssod.errors import InputError

Normalizer = Literal["sampled", "matched"]
Mining = Literal["student", "teacher", "none"]
MATCH_IOU = 0.5  # of the teacher's proposals
EPS = 1e-6  # a mean of numbers that are the bound is not below it for its rounding


def self_assignment_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    normalizer: Tensor | float,
    temperature: float = 0.5,
) -> Tensor:
    """
    Cross entropy of the student's distributions against the teacher's, sharpened.

    Proposal self-assignment of LabelMatch (https://arxiv.org/abs/2206.06608): the sum of
    `w * CE(softmax(teacher / temperature), softmax(student))`, background included. The temperature
    is the published code's; the paper has none.

    Args:
        student_logits: (R, K + 1).
        teacher_logits: (R, K + 1) of the same regions; gets no gradient.
        weights: (R,) factor on each region.
        normalizer: what the sum is divided by, above 0.
        temperature: above 0; below 1 sharpens.

    Returns:
        Scalar; with R = 0 a zero connected to `student_logits`.
    """
    targets = (teacher_logits.detach() / temperature).softmax(1)
    losses = -(targets * student_logits.log_softmax(1)).sum(1)
    return (weights * losses).sum() / normalizer


def mine_reliable(
    scores: Tensor,
    ious: Tensor,
    rows: Tensor,
    num_boxes: int,
    min_score: float = 0.8,
    min_iou: float = 0.8,
) -> Tensor:
    """
    Return which boxes the teacher is sure of, in all regions around them together.

    Reliable pseudo-label mining of LabelMatch (https://arxiv.org/abs/2206.06608): the mean score
    and the mean IoU of a box's regions must both reach their bounds.

    Args:
        scores: (R,) the teacher's probabilities of the box's class.
        ious: (R,) of the teacher's regressed regions with the box.
        rows: (R,) int64 in [0, num_boxes], the box of each region; num_boxes for none.
        num_boxes: B.
        min_score: least mean score.
        min_iou: least mean IoU.

    Returns:
        (B,) bool; False for boxes without regions.
    """
    member = (rows == torch.arange(num_boxes, device=rows.device)[:, None]).double()
    counts = member.sum(1)
    # What is not a number counts as 0, and for its own box alone.
    sums = member @ torch.stack([scores, ious], 1).double().nan_to_num()
    score, iou = (sums / counts.clamp(min=1)[:, None] + EPS).unbind(1)
    return (counts > 0) & (score >= min_score) & (iou >= min_iou)


@METHOD_REGISTRY.register()
class LabelMatch(Method):
    """
    Proposal self-assignment and reliable pseudo-label mining, in training only.

    LabelMatch (https://arxiv.org/abs/2206.06608), for the part 1 - w of each pseudo-box that the
    main branch does not learn, w being its weight: all of an undecided box (between ACT's two
    thresholds, or two fixed ones), and a part of those that SoftMatch weighs. The student's regions
    that were matched to the box learn what the teacher's box head says of the same regions of the
    weak view, rescored by the other methods. If the teacher is sure of a box, its regions learn it
    as an object instead: weight 1, also for coordinates where these are learned, and for methods
    after this one in the iteration.

    Differs from the published code: with two thresholds a region is of the reliable or of the
    undecided boxes, never of both, and the main branch's losses are divided by all sampled regions.

    Args:
        weight: factor on the self-assignment.
        normalizer: "sampled" regions of the batch or "matched" ones, by their part 1 - w.
        mining: "student": by the student's sampled regions. "teacher": by the teacher's proposals
            with an IoU of at least 0.5, before non-maximum suppression. "none": not at all.
        min_score: least mean score of a mined box.
        min_iou: least mean IoU of a mined box.
        temperature: of the teacher's distributions.

    Raises:
        InputError: if an argument is out of range.
    """

    group = "LABEL_MATCH"
    undecided = "main"

    def __init__(
        self,
        *,
        weight: float = 1.0,
        normalizer: Normalizer = "sampled",
        mining: Mining = "student",
        min_score: float = 0.8,
        min_iou: float = 0.8,
        temperature: float = 0.5,
    ):
        super().__init__()
        for key, value, choices in (
            ("NORMALIZER", normalizer, get_args(Normalizer)),
            ("MINING", mining, get_args(Mining)),
        ):
            if value not in choices:
                raise InputError(f"SSOD.LABEL_MATCH.{key} must be one of {choices}, got {value!r}")
        if not weight >= 0:
            raise InputError(f"SSOD.LABEL_MATCH.WEIGHT must be at least 0, got {weight}")
        self.weight = weight
        self.normalizer = normalizer
        self.mining = mining
        self.min_score = min_score
        self.min_iou = min_iou
        self.temperature = temperature

    @torch.no_grad()
    def reweight(self, step: Step, samples: RegionSamples, regions: RegionOutput) -> RegionSamples:
        """Score the regions of undecided boxes by the teacher; those of mined boxes weigh 1."""
        rest = samples.look_up([1 - labels.weights for labels in step.pseudo_labels])
        counts = [len(boxes) for boxes in samples.boxes]
        rows = kept_rows([r > 0 for r in rest.split(counts)])
        boxes = [b[row] for b, row in zip(samples.boxes, rows, strict=True)]
        starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        flat = torch.cat([row + start for row, start in zip(rows, starts, strict=True)])
        assert step.unlabeled is not None, "there are unlabeled images"
        layers = step.unlabeled.layers
        weak_boxes = [step.weak_boxes(layer, boxes) for layer in layers]
        teacher = [step.ask_teacher(*item) for item in zip(layers, weak_boxes, strict=True)]
        before = [output.logits.softmax(1) for output in teacher]
        probs = [
            step.rescore(p, output.embeddings) for p, output in zip(before, teacher, strict=True)
        ]
        if self.mining != "none":
            if self.mining == "student":
                found = [Candidates(*item) for item in zip(weak_boxes, teacher, probs, strict=True)]
                matched = list(samples.matched[flat].split([len(b) for b in boxes]))
            else:
                assert step.candidates is not None, "the teacher has looked"
                found = [_of_images(step.candidates, layer.images) for layer in layers]
                matched = None
            mined = self._mine(step, found, matched)
            step.shared["LabelMatch.mined"] = torch.cat(mined)
            step.pseudo_labels = [
                _as_reliable(labels, m) for labels, m in zip(step.pseudo_labels, mined, strict=True)
            ]
            is_mined = samples.look_up(mined)
            rest = rest.masked_fill(is_mined, 0)
            samples = replace(
                samples,
                weights=samples.weights.masked_fill(is_mined, 1),
                box_weights=samples.box_weights.masked_fill(is_mined, 1),
            )
        # Exactly the teacher's where no method has changed the probabilities, which may be 0.
        tiny = torch.finfo(probs[0].dtype).tiny
        logits = [
            output.logits + (after.clamp(min=tiny) / first.clamp(min=tiny)).log()
            for output, first, after in zip(teacher, before, probs, strict=True)
        ]
        of_layer = samples.look_up([labels.layer for labels in step.pseudo_labels])[flat]
        step.shared["LabelMatch"] = flat, choose_layer(logits, of_layer), rest[flat]
        return samples

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return `loss_self_assign`, a scalar; 0 and connected to the graph without regions."""
        assert step.main is not None, "after the main branch"
        flat, teacher_logits, weights = step.shared["LabelMatch"]
        logits = step.main.regions.logits
        is_sampled = self.normalizer == "sampled"
        loss = self_assignment_loss(
            logits[flat],
            teacher_logits,
            weights,
            max(len(logits), 1) if is_sampled else weights.sum().clamp(min=1),
            self.temperature,
        )
        return {"loss_self_assign": self.weight * loss}

    def metrics(self, step: Step) -> dict[str, Tensor]:
        """Return boxes that are mined and regions that are assigned in the iteration, an image."""
        if "LabelMatch" not in step.shared:
            return {}
        counted = {"pseudo/self_assigned_per_image": step.shared["LabelMatch"][2] > 0}
        if self.mining != "none":
            counted["pseudo/mined_per_image"] = step.shared["LabelMatch.mined"]
        return {name: step.per_image(mask) for name, mask in counted.items()}

    def _mine(
        self, step: Step, found: list[Candidates], matched: list[Tensor] | None
    ) -> list[Tensor]:
        """
        Return which of each strong view's boxes of weight below 1 the teacher is sure of.

        Args:
            step: of which boxes are decided.
            found: regions of each layer, in pixels of the weak views.
            matched: the box of each region; None to match them.
        """
        assert step.unlabeled is not None, "there are unlabeled images"
        mined = [torch.zeros_like(labels.reliable) for labels in step.pseudo_labels]
        for number, (layer, regions) in enumerate(zip(step.unlabeled.layers, found, strict=True)):
            counts = [len(boxes) for boxes in regions.boxes]
            columns = regions.class_probs.split(counts), regions.output.deltas.split(counts)
            for i, labels in enumerate(step.pseudo_labels):
                boxes, probs, deltas = regions.boxes[i], columns[0][i], columns[1][i]
                own = labels.layer == number
                rows = _match(boxes, labels, own) if matched is None else matched[i]
                weak = step.unlabeled.weak[layer.images[i]]
                size = (weak.shape[1], weak.shape[2])
                sure = self._are_sure(step.teacher, labels, rows, boxes, probs, deltas, size)
                mined[i] = mined[i] | (sure & own)
        return mined

    def _are_sure(
        self,
        teacher: RegionDetector,
        labels: PseudoLabels,
        rows: Tensor,
        boxes: Tensor,
        probs: Tensor,
        deltas: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        """Return which of one image's boxes are mined, by regions that were matched to `rows`."""
        if not len(labels):
            return labels.reliable
        known = rows.clamp(max=len(labels) - 1)
        regions, classes = torch.arange(len(rows), device=rows.device), labels.classes[known]
        refined = teacher.regress(boxes, deltas, classes)
        ious = box_iou(labels.found, clip_boxes_to_image(refined, size))[known, regions]
        bounds = (len(labels), self.min_score, self.min_iou)
        return mine_reliable(probs[regions, classes], ious, rows, *bounds) & (labels.weights < 1)


def _match(regions: Tensor, labels: PseudoLabels, own: Tensor) -> Tensor:
    """Return the box, among its own, of each of an image's regions; else the number of boxes."""
    if not len(labels):
        return torch.zeros(len(regions), dtype=torch.int64, device=regions.device)
    iou, row = box_iou(labels.found, regions).masked_fill(~own[:, None], 0).max(0)
    return row.masked_fill(iou < MATCH_IOU, len(labels))


def _of_images(found: Candidates, images: list[int]) -> Candidates:
    """Return the candidates of these images, in their order."""
    counts = [len(boxes) for boxes in found.boxes]
    if images == list(range(len(counts))):
        return found
    rows = torch.arange(sum(counts), device=found.class_probs.device).split(counts)
    row = torch.cat([rows[image] for image in images])
    boxes = [found.boxes[image] for image in images]
    return Candidates(boxes, found.output[row], found.class_probs[row])


def _as_reliable(labels: PseudoLabels, mined: Tensor) -> PseudoLabels:
    return replace(
        labels,
        weights=labels.weights.masked_fill(mined, 1),
        box_weights=labels.box_weights.masked_fill(mined, 1),
        reliable=labels.reliable | mined,
    )
