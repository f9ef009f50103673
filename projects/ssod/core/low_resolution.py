"""
A second branch on the image at half the size, which learns pseudo-boxes of lower confidence.

LSM, low-confidence samples mining (https://arxiv.org/abs/2306.16201).

Shape shorthand: N images, R regions of all images, K foreground classes (background is index K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ssod.core.filters import kept_rows
from ssod.core.interfaces import RegionDetector
from ssod.core.method import METHOD_REGISTRY, Method, Step
from ssod.core.self_distillation import self_distillation_loss
from ssod.core.structures import PseudoLabels, RegionSamples, Targets
from ssod.errors import InputError

__all__ = ["LowResolutionBranch", "self_distillation_loss"]

Head = Literal["aux", "main"]
SMALL_LEVELS = (2, 3, 4)  # of the small image; its P5 has no counterpart in the full one
STRIDE_SHIFT = 1  # halving the image lowers levels by one


@METHOD_REGISTRY.register()
class LowResolutionBranch(Method):
    """
    Pseudo information mining (PIM) and self-distillation (SD) of LSM, in training only.

    LSM (https://arxiv.org/abs/2306.16201). The strong view at half the size goes through the
    student's backbone. Levels 2 to 4 of it stand in for 3 to 5 of the full image, so regions keep
    their coordinates: they are the main branch's proposals, sampled for the branch's boxes. All
    boxes that the filter kept, undecided ones included, are learned there with weight 1, by a
    classifier of its own and the student's box regressor. Where the main branch learns less of a
    box than that, by its weight w, the two classifiers also learn from each other: its regions are
    distilled with 1 - w. So `FixedThreshold` and ACT distil between their two thresholds,
    SoftMatch below its running mean.

    Batch norms use their running statistics in the branch, and do not update them.

    Args:
        student: detector whose regions are pooled from levels 2 to 5.
        weight: factor on the losses of PIM.
        levels: of the small image; regions of others have weight 0.
        head: "aux": a classifier of its own, a copy of the student's when the teacher starts.
            "main": the student's; coordinates are learned only where the main branch learns them.
        rpn_loss: train the RPN on the small image too, a second pass of it (PseCo).
        distill_weight: factor on the self-distillation; 0 for none.
        unsup_box_losses: whether the main branch learns coordinates from pseudo-boxes.

    Raises:
        InputError: if an argument is out of range, or the student has other levels.
    """

    group = "LSM"
    undecided = "branch"

    def __init__(
        self,
        student: RegionDetector,
        *,
        weight: float = 0.5,
        levels: Sequence[int] = SMALL_LEVELS,
        head: Head = "aux",
        rpn_loss: bool = False,
        distill_weight: float = 1.0,
        unsup_box_losses: bool = False,
    ):
        super().__init__()
        if head not in get_args(Head):
            raise InputError(f"SSOD.LSM.HEAD must be one of {get_args(Head)}, got {head!r}")
        if not levels or not set(levels) <= set(SMALL_LEVELS):
            raise InputError(
                f"SSOD.LSM.LEVELS must be some of {SMALL_LEVELS}, got {tuple(levels)}: the levels "
                "of the small image that stand in for the next ones of the full image"
            )
        for key, value in {"WEIGHT": weight, "DISTILL_WEIGHT": distill_weight}.items():
            if not value >= 0:
                raise InputError(f"SSOD.LSM.{key} must be at least 0, got {value}")
        _check_levels(student)
        self.classifier = student.new_classifier() if head == "aux" else None
        self.weight = weight
        self.levels = tuple(levels)
        self.distill_weight = distill_weight
        self.learns_boxes = head == "aux" or unsup_box_losses
        rpn_losses = ("loss_rpn_cls", "loss_rpn_loc")[: 2 if unsup_box_losses else 1]
        self.rpn_losses = rpn_losses if rpn_loss else ()

    @torch.no_grad()
    def start(self, student: RegionDetector, teacher: RegionDetector) -> None:
        """Copy the student's classifier."""
        if self.classifier is not None:
            self.classifier.load_state_dict(student.new_classifier().state_dict())

    def losses(self, step: Step) -> dict[str, Tensor]:
        """
        Return `loss_cls_low_res`, `loss_box_reg_low_res`, ..., `loss_distill`, scalars.

        Without boxes to learn the last two are zeros connected to the graph.
        """
        with step.student.fixed_norm_statistics():
            return self._losses(step)

    def _losses(self, step: Step) -> dict[str, Tensor]:
        assert step.batch is not None and step.main is not None, "after the main branch"
        student = step.student
        targets = [_fully_weighted(labels) for labels in step.pseudo_labels]
        small = step.batch.half()
        small_features = student.features(small)
        samples = student.sample(step.main.proposals, targets)
        output = student.score_regions(small_features, samples.boxes, stride_shift=STRIDE_SHIFT)
        if self.classifier is not None:
            output = replace(output, logits=self.classifier(output.embeddings).float())
        active = self._active(student.levels(samples.boxes)).to(samples.weights)
        weighted = replace(
            samples, weights=samples.weights * active, box_weights=samples.box_weights * active
        )
        losses = student.region_losses(output, weighted)
        if not self.learns_boxes:
            del losses["loss_box_reg"]
        if self.rpn_losses:
            halves = [replace(target, boxes=target.boxes / 2) for target in targets]
            _, rpn = student.propose(small_features, small, halves)
            losses |= {name: rpn[name] for name in self.rpn_losses}
        losses = {f"{name}_low_res": self.weight * loss for name, loss in losses.items()}
        if self.distill_weight:
            weights = samples.look_up([1 - labels.weights for labels in step.pseudo_labels])
            distilled = _distill(step, samples, output.logits, weights * active)
            losses["loss_distill"] = self.distill_weight * distilled
        return losses

    def _active(self, levels: Tensor) -> Tensor:
        """Whether regions of these levels of the full image, (R,), count."""
        small = (levels - STRIDE_SHIFT).clamp(min=SMALL_LEVELS[0])
        return torch.stack([small == level for level in self.levels]).any(0)


def _fully_weighted(labels: PseudoLabels) -> Targets:
    ones = torch.ones_like(labels.weights)
    return replace(labels.to_targets(), weights=ones, box_weights=ones)


def _distill(step: Step, samples: RegionSamples, aux_logits: Tensor, weights: Tensor) -> Tensor:
    """SD over regions of which few have a weight (R,), so the main branch scores these alone."""
    sizes = [len(boxes) for boxes in samples.boxes]
    rows = kept_rows([w > 0 for w in weights.split(sizes)])

    def select(values: Sequence[Tensor]) -> list[Tensor]:
        return [value[row] for value, row in zip(values, rows, strict=True)]

    return self_distillation_loss(
        step.student.score_regions(step.features, select(samples.boxes)).logits,
        torch.cat(select(aux_logits.split(sizes))),
        max(len(weights), 1),
        torch.cat(select(weights.split(sizes))),
    )


def _check_levels(student: RegionDetector) -> None:
    smallest_and_largest = torch.tensor([[0.0, 0.0, 1e-3, 1e-3], [0.0, 0.0, 1e6, 1e6]])
    first, last = student.levels([smallest_and_largest]).tolist()
    if (first, last) != (SMALL_LEVELS[0], SMALL_LEVELS[-1] + STRIDE_SHIFT):
        raise InputError(
            f"SSOD.LSM needs regions pooled from levels 2 to 5, got {first} to {last}; set "
            "MODEL.ROI_HEADS.IN_FEATURES accordingly"
        )
