"""
The losses of a training iteration: a student, its mean teacher and pseudo-labels.

Shape shorthand: N images, R boxes of one image, K foreground classes, D embedding size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ssod.core.ema import update_ema
from ssod.core.filters import PseudoLabelFilter, kept_rows
from ssod.core.interfaces import BOX_LOSSES, RegionDetector
from ssod.core.method import Method, Step
from ssod.core.strong_views import EmptyImages, describe, leave_out_empty, transfer
from ssod.core.structures import PseudoLabels, RegionOutput, RegionSamples, TwoStreamBatch
from ssod.errors import InputError

LabeledViews = Literal["both", "strong", "weak"]


class TeacherStudent(nn.Module):
    """
    A student detector and its EMA teacher, trained on labeled and unlabeled images.

    Unbiased Teacher (https://arxiv.org/abs/2102.09480): supervised burn-in, then the teacher starts
    as a copy of the student, labels weakly augmented unlabeled images, and the student learns
    them from the strongly augmented view. What else is learned comes from methods, by their hooks.
    `forward` is one iteration's losses; call `start_teacher_if_due` before it and `after_step` once
    the optimizer has stepped. Parameters are those of `student`, the frozen `teacher`, the filter
    and the methods, so one checkpoint holds them; the iteration and whether the teacher has
    started are saved with them.

    Differs from the published code: the teacher is in eval mode and does not exist, rather than
    being random, before the end of the burn-in; left-out losses are left out, not multiplied by
    zero.

    Args:
        student: detector whose weights are already initialised; the teacher starts as its copy.
        pseudo_label_filter: decides what of the teacher's detections is learned.
        burn_in_iters: iterations of labeled-only training before the teacher starts.
        ema_decay: share of the teacher kept at each update, in [0, 1).
        ema_gamma: at least 0. The share is smaller while the teacher is young, see `current_decay`.
        unsup_loss_weight: factor on every `*_unsup` loss. With 0 unlabeled images are not used,
            while the teacher averages as usual: the control of a comparison.
        unsup_box_losses: whether box losses are computed against pseudo-boxes.
        empty_images: what is learned of strong views without a target, as `EmptyImages` says.
        labeled_views: views of labeled images the student learns from.
        methods: what to add, by name; hooks are called in this order.

    Raises:
        InputError: if an argument is out of range.
    """

    def __init__(
        self,
        student: RegionDetector,
        pseudo_label_filter: PseudoLabelFilter,
        *,
        burn_in_iters: int,
        ema_decay: float,
        ema_gamma: float = 0.0,
        unsup_loss_weight: float,
        unsup_box_losses: bool = False,
        empty_images: EmptyImages = "background",
        labeled_views: LabeledViews = "both",
        methods: Mapping[str, Method] | None = None,
    ):
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise InputError(
                f"SSOD.EMA_DECAY must be in [0, 1), got {ema_decay}. "
                "It is the share of the teacher kept at each update."
            )
        if not 0 <= ema_gamma < math.inf:
            raise InputError(f"SSOD.EMA_GAMMA must be finite and at least 0, got {ema_gamma}")
        least_0 = {"BURN_IN_ITERS": burn_in_iters, "UNSUP_LOSS_WEIGHT": unsup_loss_weight}
        for key, number in least_0.items():
            if not number >= 0:
                raise InputError(f"SSOD.{key} must be at least 0, got {number}")
        for key, value, choices in (
            ("LABELED_VIEWS", labeled_views, get_args(LabeledViews)),
            ("EMPTY_IMAGES", empty_images, get_args(EmptyImages)),
        ):
            if value not in choices:
                raise InputError(f"SSOD.{key} must be one of {choices}, got {value!r}")
        own = {id(parameter) for parameter in student.parameters()}
        for name, method in (methods or {}).items():
            if any(id(parameter) in own for parameter in method.parameters()):
                raise InputError(f"{name}: a method must not keep the student; it is in each step")
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.pseudo_label_filter = pseudo_label_filter
        self.methods: Any = nn.ModuleDict(dict(methods or {}))
        self.burn_in_iters = burn_in_iters
        self.ema_decay = ema_decay
        self.ema_gamma = ema_gamma
        self.unsup_loss_weight = unsup_loss_weight
        self.unsup_box_losses = unsup_box_losses
        self.empty_images = empty_images
        self.labeled_views = labeled_views
        self.iteration = 0
        self.teacher_started = False
        self.metrics: dict[str, Tensor] = {}
        self.train(self.training)

    def train(self, mode: bool = True) -> TeacherStudent:
        """Set the mode of the student and the filter; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Iteration and whether the teacher has started, for the checkpoint."""
        return torch.tensor([self.iteration, int(self.teacher_started)])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.iteration, started = state.tolist()
        self.teacher_started = bool(started)

    @property
    def uses_unlabeled(self) -> bool:
        """Whether the current iteration learns from unlabeled images."""
        return self.unsup_loss_weight > 0 and self.iteration >= self.burn_in_iters

    @property
    def drops_undecided(self) -> bool:
        """Whether boxes that the filter is undecided about are background to the main branch."""
        keeps = any(method.undecided == "main" for method in self.methods.values())
        return self.pseudo_label_filter.drops_undecided and not keeps

    def forward(self, batch: TwoStreamBatch) -> dict[str, Tensor]:
        """
        Compute the weighted losses of one iteration; their sum is the objective.

        Losses of unlabeled images carry the suffix `_unsup`. `self.metrics` holds detached
        scalars of this call.

        Raises:
            ValueError: if the iteration needs unlabeled images and the batch has none, or a teacher
                that has not started.
        """
        since_burn_in = self.iteration - self.burn_in_iters
        step = Step(self.student, self.teacher, since_burn_in, batch.labeled)
        step.rescore, step.drops_undecided = self.rescore, self.drops_undecided
        losses = self.supervised_losses(step)
        self.metrics = {}
        if self.uses_unlabeled:
            if batch.unlabeled is None:
                raise ValueError(
                    f"iteration {self.iteration} is past SSOD.BURN_IN_ITERS {self.burn_in_iters} "
                    "and needs unlabeled images, but the batch has none. "
                    "Set SSOD.UNSUP_LOSS_WEIGHT 0 to train on labeled images alone."
                )
            if not self.teacher_started:
                raise ValueError("the teacher has not started: call start_teacher_if_due before")
            step.unlabeled = batch.unlabeled
            self.detect(step)
            step.pseudo_labels = self.pseudo_label_filter(step.detections)
            transfer(step)
            losses |= self.unsupervised_losses(step)
            self.metrics |= describe(step) | self.pseudo_label_filter.metrics()
        else:
            for method in self.methods.values():
                losses["loss_cls"] = losses["loss_cls"] + method.idle_loss()
        for method in self.methods.values():
            self.metrics |= method.metrics(step)
        return losses

    @property
    def current_decay(self) -> float:
        """
        Share of the teacher kept at the update of this iteration.

        At t iterations after the burn-in at most t / (ema_gamma + t), as in MixPL's code. With
        ema_gamma above 0 the first update, t = 0, copies the student; then the student of iteration
        t counts about as t ** (ema_gamma - 1), until `ema_decay` is the smaller.
        """
        # The teacher has started later if a run is resumed with a burn-in that was shortened; with
        # one that was lengthened it remains a copy until its end.
        t = max(self.iteration - self.burn_in_iters, 0)
        if self.ema_gamma == 0:
            return self.ema_decay
        return min(self.ema_decay, t / (self.ema_gamma + t))

    def after_step(self) -> None:
        """Advance the teacher and the iteration; call once after each optimizer step."""
        if self.teacher_started:
            update_ema(self.teacher, self.student, self.current_decay)
        self.iteration += 1

    def start_teacher_if_due(self) -> bool:
        """
        Make the teacher a copy of the student if the burn-in is over and it is not one yet.

        Returns:
            Whether it started.
        """
        # Also true when a run is resumed with a burn-in that was shortened to before its iteration.
        if self.teacher_started or self.iteration < self.burn_in_iters:
            return False
        update_ema(self.teacher, self.student, decay=0.0)
        for method in self.methods.values():
            method.start(self.student, self.teacher)
        self.teacher_started = True
        return True

    @torch.no_grad()
    def detect(self, step: Step) -> None:
        """Let the teacher detect in the weak views, rescored by the methods; fills the record."""
        assert step.unlabeled is not None, "there are unlabeled images"
        batch = self.teacher.preprocess(step.unlabeled.weak)
        features = self.teacher.features(batch)
        candidates = self.teacher.candidates(features, batch, self.rescore)
        step.detections = self.teacher.suppress(candidates, batch)
        if self.methods:  # without any it would only be memory that the student needs
            step.teacher_features, step.candidates = features, candidates

    @torch.no_grad()
    def pseudo_labels(self, images: list[Tensor]) -> list[PseudoLabels]:
        """Label uint8 RGB (3, h, w) images with the teacher and the filter, one item an image."""
        batch = self.teacher.preprocess(images)
        found = self.teacher.predict(self.teacher.features(batch), batch, self.rescore)
        return self.pseudo_label_filter(found)

    def rescore(self, class_probs: Tensor, embeddings: Tensor) -> Tensor:
        """Let the methods change (R, K + 1) class probabilities of regions, R = 0 allowed."""
        for method in self.methods.values():
            class_probs = method.rescore(class_probs, embeddings)
        return class_probs

    def supervised_losses(self, step: Step) -> dict[str, Tensor]:
        """Return the student's losses on the chosen views of labeled images; fills the record."""
        labeled = step.labeled
        assert labeled.targets is not None, "labeled images come with targets"
        strong_targets = labeled.strong_targets or labeled.targets
        views, targets = {
            "both": (labeled.strong + labeled.weak, strong_targets + labeled.targets),
            "strong": (labeled.strong, strong_targets),
            "weak": (labeled.weak, labeled.targets),
        }[self.labeled_views]
        step.labeled_batch = self.student.preprocess(views)
        step.labeled_features = self.student.features(step.labeled_batch)
        step.labeled_output = self.student.losses(
            step.labeled_features, step.labeled_batch, targets
        )
        for method in self.methods.values():
            method.observe_labeled(step)
        return dict(step.labeled_output.losses)

    def unsupervised_losses(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted losses on strong views, named `*_unsup`; fills the record."""
        assert step.unlabeled is not None, "there are unlabeled images"
        step.unmixed, step.unmixed_labels = step.unlabeled, step.pseudo_labels
        for method in self.methods.values():
            step.unlabeled, step.pseudo_labels = method.mix(step.unlabeled, step.pseudo_labels)
        step.learned = step.pseudo_labels
        if step.drops_undecided:
            rows = kept_rows([p.reliable for p in step.learned])
            step.learned = [p[row] for p, row in zip(step.learned, rows, strict=True)]
        weight = self.unsup_loss_weight * leave_out_empty(step, self.empty_images)
        step.batch = self.student.preprocess(step.unlabeled.strong)
        step.features = self.student.features(step.batch)
        step.main = self.student.losses(
            step.features,
            step.batch,
            [p.to_targets() for p in step.learned],
            partial(self._reweight, step) if self.methods else None,
        )
        losses = {
            name: loss
            for name, loss in step.main.losses.items()
            if self.unsup_box_losses or name not in BOX_LOSSES
        }
        for name, method in self.methods.items():
            added = self.method_losses(name, method, step)
            assert not losses.keys() & added.keys(), f"{name} has losses of names that are taken"
            losses |= added
        return {f"{name}_unsup": weight * loss for name, loss in losses.items()}

    def _reweight(self, step: Step, samples: RegionSamples, regions: RegionOutput) -> RegionSamples:
        for method in self.methods.values():
            samples = method.reweight(step, samples, regions)
        return samples

    def method_losses(self, name: str, method: Method, step: Step) -> dict[str, Tensor]:
        """Return the losses of one method; hosts may keep apart what their parts log in it."""
        return method.losses(step)
