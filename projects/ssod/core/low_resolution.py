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
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import box_iou

from ssod.core.filters import kept_rows
from ssod.core.interfaces import Features, LossOutput, RegionDetector
from ssod.core.self_distillation import SelfDistillation, self_distillation_loss
from ssod.core.structures import (
    ImageBatch,
    PseudoLabels,
    RegionSamples,
    Targets,
)
from ssod.errors import InputError

__all__ = ["LowResolutionBranch", "self_distillation_loss"]

Interpolation = Literal["bilinear", "nearest"]
Proposals = Literal["rpn", "main"]
Head = Literal["aux", "main"]
HeadInit = Literal["main", "random"]
BoxLoss = Literal["all", "reliable", "none"]
SMALL_LEVELS = (2, 3, 4)  # of the small image; its P5 has no counterpart in the full one
STRIDE_SHIFT = 1  # halving the image lowers levels by one


class LowResolutionBranch(nn.Module):
    """
    Pseudo information mining (PIM) and self-distillation of LSM, in training only.

    LSM (https://arxiv.org/abs/2306.16201). The strong view at half the size goes through the
    student's backbone. Levels 2 to 4 of it stand in for 3 to 5 of the full image, so regions keep
    their coordinates. All boxes that the filter kept, undecided ones included, are learned there
    with weight 1, by a classifier of its own and the student's box regressor. Where the main branch
    learns less of a box than that, the two classifiers also learn from each other; see
    `SelfDistillation`. So `FixedThreshold` and ACT distil between their two thresholds, SoftMatch
    below its running mean.

    What the paper leaves open is an argument. Batch norms use their running statistics in the
    branch, and do not update them.

    Args:
        classifier: the auxiliary one, D to K + 1; None for the student's own.
        distillation: None for none.
        weight: factor on the losses of PIM.
        ramp_iters: iterations over which all losses grow linearly from 0.
        interpolation: of the small image.
        proposals: "rpn": the main branch's proposals, sampled for the branch's boxes. "main": the
            regions that the main branch sampled, labelled by the branch's boxes; cheaper.
        foreground_iou: overlap from which regions of "main" match a box.
        levels: of the small image; regions of others have weight 0.
        drop_unaligned: give regions of the full image's level 2 weight 0, instead of pooling them
            from level 2 of the small one.
        head_init: "main": the classifier becomes a copy of the student's when the teacher starts.
            "random": it starts from a normal distribution of deviation 0.01.
        box_loss: boxes whose coordinates are learned; "reliable" by the main branch's weights.
        rpn_losses: of `loss_rpn_cls` and `loss_rpn_loc`, those computed on the small image.

    Raises:
        InputError: if an argument is out of range.
    """

    def __init__(
        self,
        classifier: nn.Linear | None,
        distillation: SelfDistillation | None = None,
        *,
        weight: float = 0.5,
        ramp_iters: int = 0,
        interpolation: Interpolation = "bilinear",
        proposals: Proposals = "rpn",
        foreground_iou: float = 0.5,
        levels: Sequence[int] = SMALL_LEVELS,
        drop_unaligned: bool = False,
        head_init: HeadInit = "main",
        box_loss: BoxLoss = "all",
        rpn_losses: Sequence[str] = (),
    ):
        super().__init__()
        _check_choice("INTERPOLATION", interpolation, get_args(Interpolation))
        _check_choice("PROPOSALS", proposals, get_args(Proposals))
        _check_choice("HEAD_INIT", head_init, get_args(HeadInit))
        _check_choice("BOX_LOSS", box_loss, get_args(BoxLoss))
        if not levels or not set(levels) <= set(SMALL_LEVELS):
            raise InputError(
                f"SSOD.LSM.LEVELS must be some of {SMALL_LEVELS}, got {tuple(levels)}: the levels "
                "of the small image that stand in for the next ones of the full image"
            )
        for key, value in {"WEIGHT": weight, "RAMP_ITERS": ramp_iters}.items():
            if not value >= 0:
                raise InputError(f"SSOD.LSM.{key} must be at least 0, got {value}")
        self.classifier = classifier
        if classifier is not None and head_init == "random":
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)
        self.distillation = distillation
        self.weight = weight
        self.ramp_iters = ramp_iters
        self.interpolation: Interpolation = interpolation
        self.proposals = proposals
        self.foreground_iou = foreground_iou
        self.levels = tuple(levels)
        self.drop_unaligned = drop_unaligned
        self.head_init = head_init
        self.box_loss = box_loss
        self.rpn_losses = tuple(rpn_losses)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: RegionDetector) -> LowResolutionBranch | None:
        """
        Build the branch that `SSOD.LSM` describes, None if it is not enabled.

        Raises:
            InputError: for a value out of range.
        """
        keys = cfg.SSOD.LSM
        if not keys.ENABLED:
            return None
        _check_choice("HEAD", keys.HEAD, get_args(Head))
        _check_levels(student)
        rpn_losses = (
            ("loss_rpn_cls", "loss_rpn_loc") if cfg.SSOD.UNSUP_BOX_LOSSES else ("loss_rpn_cls",)
        )
        return cls(
            student.new_classifier() if keys.HEAD == "aux" else None,
            SelfDistillation.from_config(cfg),
            weight=keys.WEIGHT,
            ramp_iters=keys.RAMP_ITERS,
            interpolation=keys.INTERPOLATION,
            proposals=keys.PROPOSALS,
            foreground_iou=cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[-1],
            levels=keys.LEVELS,
            drop_unaligned=keys.DROP_UNALIGNED,
            head_init=keys.HEAD_INIT,
            box_loss=keys.BOX_LOSS,
            rpn_losses=rpn_losses if keys.RPN_LOSS else (),
        )

    @torch.no_grad()
    def start(self, student: RegionDetector) -> None:
        """Copy the student's classifier, unless the own one starts at random."""
        if self.classifier is not None and self.head_init == "main":
            self.classifier.load_state_dict(student.new_classifier().state_dict())

    def idle_loss(self) -> Tensor | float:
        """Return a zero connected to every parameter, for iterations that do not use them."""
        # `DistributedDataParallel` wants a gradient of each.
        return sum(0.0 * parameter.sum() for parameter in self.parameters())

    def forward(
        self,
        student: RegionDetector,
        batch: ImageBatch,
        features: Features,
        main: LossOutput,
        pseudo_labels: list[PseudoLabels],
        iterations: int,
    ) -> dict[str, Tensor]:
        """
        Return the weighted losses `loss_cls_low_res`, `loss_box_reg_low_res`, ..., `loss_distill`.

        Without boxes to learn the last two are zeros connected to the graph.

        Args:
            student: in train mode.
            batch: strong views of N images.
            features: the student's, of `batch`.
            main: the main branch's losses of `batch`.
            pseudo_labels: of each image, all that the filter kept.
            iterations: since the end of the burn-in.
        """
        ramp = min(1.0, iterations / self.ramp_iters) if self.ramp_iters else 1.0
        with student.fixed_norm_statistics():
            losses = self._losses(student, batch, features, main, pseudo_labels)
        return {name: ramp * loss for name, loss in losses.items()}

    def _losses(
        self,
        student: RegionDetector,
        batch: ImageBatch,
        features: Features,
        main: LossOutput,
        pseudo_labels: list[PseudoLabels],
    ) -> dict[str, Tensor]:
        targets = [self._targets(labels) for labels in pseudo_labels]
        small = batch.half()
        small_features = student.features(small)
        samples = self._sample(student, main, targets)
        output = student.score_regions(small_features, samples.boxes, stride_shift=STRIDE_SHIFT)
        if self.classifier is not None:
            output = replace(output, logits=self.classifier(output.embeddings).float())
        active = self._active(student.levels(samples.boxes)).to(samples.weights)
        weighted = replace(
            samples, weights=samples.weights * active, box_weights=samples.box_weights * active
        )
        losses = student.region_losses(output, weighted)
        if self.box_loss == "none":
            del losses["loss_box_reg"]
        if self.rpn_losses:
            halves = [replace(target, boxes=target.boxes / 2) for target in targets]
            _, rpn = student.propose(small_features, small, halves)
            losses |= {name: rpn[name] for name in self.rpn_losses}
        losses = {f"{name}_low_res": self.weight * loss for name, loss in losses.items()}
        if self.distillation is not None:
            weights = self.distillation.region_weights(output.logits, samples, pseudo_labels)
            losses["loss_distill"] = self._distill(
                student, features, main, samples, output.logits, weights * active
            )
        return losses

    def _targets(self, labels: PseudoLabels) -> Targets:
        ones = torch.ones_like(labels.weights)
        box_weights = labels.box_weights if self.box_loss == "reliable" else ones
        return replace(labels.to_targets(), weights=ones, box_weights=box_weights)

    def _sample(
        self, student: RegionDetector, main: LossOutput, targets: list[Targets]
    ) -> RegionSamples:
        if self.proposals == "rpn":
            return student.sample(main.proposals, targets)
        matched, classes = [], []
        for boxes, target in zip(main.samples.boxes, targets, strict=True):
            rows = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
            labels = torch.full_like(rows, student.num_classes)
            if len(target):
                overlap, rows = box_iou(boxes, target.boxes).max(1)
                is_object = overlap >= self.foreground_iou
                labels = torch.where(is_object, target.classes[rows], labels)
            matched.append(rows)
            classes.append(labels)
        return RegionSamples.from_matches(
            main.samples.boxes, classes, matched, targets, student.num_classes
        )

    def _active(self, levels: Tensor) -> Tensor:
        """Whether regions of these levels of the full image, (R,), count."""
        finest = SMALL_LEVELS[0]
        small = (levels - STRIDE_SHIFT).clamp(min=finest)
        counts = torch.zeros_like(levels, dtype=torch.bool)
        for level in self.levels:
            counts |= small == level
        return counts & (levels > finest) if self.drop_unaligned else counts

    def _distill(
        self,
        student: RegionDetector,
        features: Features,
        main: LossOutput,
        samples: RegionSamples,
        aux_logits: Tensor,
        weights: Tensor,
    ) -> Tensor:
        assert self.distillation is not None, "there is nothing to distil"
        num_sampled = len(weights)
        if self.proposals == "main":
            return self.distillation.loss(main.regions.logits, aux_logits, weights, num_sampled)
        # Few regions are distilled, so the main branch scores these alone.
        sizes = [len(boxes) for boxes in samples.boxes]
        rows = kept_rows([w > 0 for w in weights.split(sizes)])

        def select(values: Sequence[Tensor]) -> list[Tensor]:
            return [value[row] for value, row in zip(values, rows, strict=True)]

        main_logits = student.score_regions(features, select(samples.boxes)).logits
        aux_logits = torch.cat(select(aux_logits.split(sizes)))
        weights = torch.cat(select(weights.split(sizes)))
        return self.distillation.loss(main_logits, aux_logits, weights, num_sampled)


def _check_levels(student: RegionDetector) -> None:
    smallest_and_largest = torch.tensor([[0.0, 0.0, 1e-3, 1e-3], [0.0, 0.0, 1e6, 1e6]])
    first, last = student.levels([smallest_and_largest]).tolist()
    if (first, last) != (SMALL_LEVELS[0], SMALL_LEVELS[-1] + STRIDE_SHIFT):
        raise InputError(
            f"SSOD.LSM needs regions pooled from levels 2 to 5, got {first} to {last}; set "
            "MODEL.ROI_HEADS.IN_FEATURES accordingly"
        )


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"SSOD.LSM.{key} must be one of {choices}, got {value!r}")
