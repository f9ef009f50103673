"""
The training iteration: a student, its mean teacher and pseudo-labels.

Shape shorthand: N images, R boxes of one image, K foreground classes.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ssod.core.ema import update_ema
from ssod.core.filters import PseudoLabelFilter, build_filter, kept_rows
from ssod.core.interfaces import Features, LossOutput, RegionDetector
from ssod.core.low_resolution import LowResolutionBranch
from ssod.core.structures import ImageBatch, PseudoLabels, TwoStreamBatch, Views
from ssod.errors import InputError

BOX_LOSSES = ("loss_box_reg", "loss_rpn_loc")
LabeledViews = Literal["both", "strong", "weak"]


def arguments_from_config(cfg: CfgNode, student: RegionDetector) -> dict[str, Any]:
    """
    Read the arguments of `TeacherStudent`, all but the student, from a host's config.

    Raises:
        InputError: for a filter that does not exist, or a part that does not accept its keys.
    """
    ssod = cfg.SSOD
    return {
        "pseudo_label_filter": build_filter(cfg, student.num_classes),
        "low_resolution": LowResolutionBranch.from_config(cfg, student),
        "burn_in_iters": ssod.BURN_IN_ITERS,
        "ema_decay": ssod.EMA_DECAY,
        "unsup_loss_weight": ssod.UNSUP_LOSS_WEIGHT,
        "unsup_box_losses": ssod.UNSUP_BOX_LOSSES,
        "labeled_views": ssod.LABELED_VIEWS,
    }


class TeacherStudent(nn.Module):
    """
    A student detector and its EMA teacher, trained on labeled and unlabeled images.

    Unbiased Teacher (https://arxiv.org/abs/2102.09480): supervised burn-in, then the teacher starts
    as a copy of the student, labels weakly augmented unlabeled images, and the student learns
    them from the strongly augmented view. `forward` is one iteration's losses; call `after_step`
    once the optimizer has stepped. Parameters are those of `student`, the frozen `teacher` and the
    other parts, so one checkpoint holds them; the iteration and whether the teacher has started
    are saved with them.

    Differs from the published code: the teacher is in eval mode and does not exist, rather than
    being random, before the end of the burn-in; left-out losses are left out, not multiplied by
    zero.

    Args:
        student: detector whose weights are already initialised; the teacher starts as its copy.
        pseudo_label_filter: decides what of the teacher's detections is learned.
        burn_in_iters: iterations of labeled-only training before the teacher starts.
        ema_decay: share of the teacher kept at each update, in [0, 1).
        unsup_loss_weight: factor on every `*_unsup` loss. With 0 unlabeled images are not used,
            while the teacher averages as usual: the control of a comparison.
        unsup_box_losses: whether box losses are computed against pseudo-boxes.
        labeled_views: views of labeled images the student learns from.
        low_resolution: a second branch of the student that adds losses to unlabeled images.

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
        unsup_loss_weight: float,
        unsup_box_losses: bool = False,
        labeled_views: LabeledViews = "both",
        low_resolution: LowResolutionBranch | None = None,
    ):
        super().__init__()
        if burn_in_iters < 0:
            raise InputError(f"SSOD.BURN_IN_ITERS must be at least 0, got {burn_in_iters}")
        if not 0 <= ema_decay < 1:
            raise InputError(
                f"SSOD.EMA_DECAY must be in [0, 1), got {ema_decay}. "
                "It is the share of the teacher kept at each update."
            )
        if not unsup_loss_weight >= 0:
            raise InputError(f"SSOD.UNSUP_LOSS_WEIGHT must be at least 0, got {unsup_loss_weight}")
        if labeled_views not in ("both", "strong", "weak"):
            raise InputError(
                f'SSOD.LABELED_VIEWS must be "both", "strong" or "weak", got "{labeled_views}"'
            )
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.pseudo_label_filter = pseudo_label_filter
        self.low_resolution = low_resolution
        self.burn_in_iters = burn_in_iters
        self.ema_decay = ema_decay
        self.unsup_loss_weight = unsup_loss_weight
        self.unsup_box_losses = unsup_box_losses
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

    def forward(self, batch: TwoStreamBatch) -> dict[str, Tensor]:
        """
        Compute the weighted losses of one iteration; their sum is the objective.

        Losses of unlabeled images carry the suffix `_unsup`. `self.metrics` holds detached
        scalars of this call.

        Raises:
            ValueError: if the iteration needs unlabeled images and the batch has none.
        """
        self.start_teacher_if_due()
        losses = self.supervised_losses(batch.labeled)
        self.metrics = {}
        if self.uses_unlabeled:
            if batch.unlabeled is None:
                raise ValueError(
                    f"iteration {self.iteration} is past SSOD.BURN_IN_ITERS {self.burn_in_iters} "
                    "and needs unlabeled images, but the batch has none. "
                    "Set SSOD.UNSUP_LOSS_WEIGHT 0 to train on labeled images alone."
                )
            pseudo_labels = self.pseudo_labels(batch.unlabeled.weak)
            losses |= self.unsupervised_losses(batch.unlabeled, pseudo_labels)
            self.metrics = _describe(pseudo_labels) | self.pseudo_label_filter.metrics()
        elif self.low_resolution is not None:
            losses["loss_cls"] = losses["loss_cls"] + self.low_resolution.idle_loss()
        return losses

    def after_step(self) -> None:
        """Advance the iteration and the teacher; call once after each optimizer step."""
        self.iteration += 1
        if self.teacher_started:
            update_ema(self.teacher, self.student, self.ema_decay)
        else:
            self.start_teacher_if_due()

    @torch.no_grad()
    def reset_branch_state(self, optimizer: torch.optim.Optimizer) -> None:
        """
        Zero what an optimizer keeps of the second branch; call once the teacher has started.

        The branch has had gradients of zero until then. Adam has counted them as steps with a
        variance of zero, and would take steps that are too large for as long as it remembers.
        """
        if self.low_resolution is not None:
            for parameter in self.low_resolution.parameters():
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor):
                        value.zero_()

    @torch.no_grad()
    def pseudo_labels(self, images: list[Tensor]) -> list[PseudoLabels]:
        """Label uint8 RGB (3, h, w) images with the teacher and the filter, one item an image."""
        batch = self.teacher.preprocess(images)
        return self.pseudo_label_filter(self.teacher.predict(self.teacher.features(batch), batch))

    def start_teacher_if_due(self) -> None:
        """Make the teacher a copy of the student if the burn-in is over and it is not one yet."""
        # Also true when a run is resumed with a burn-in that was shortened to before its iteration.
        if not self.teacher_started and self.iteration >= self.burn_in_iters:
            update_ema(self.teacher, self.student, decay=0.0)
            if self.low_resolution is not None:
                self.low_resolution.start(self.student)
            self.teacher_started = True

    def supervised_losses(self, labeled: Views) -> dict[str, Tensor]:
        """Return the student's losses on the chosen views of labeled images."""
        views = {
            "both": labeled.strong + labeled.weak,
            "strong": labeled.strong,
            "weak": labeled.weak,
        }[self.labeled_views]
        assert labeled.targets is not None, "labeled images come with targets"
        targets = labeled.targets * (len(views) // len(labeled))
        batch = self.student.preprocess(views)
        return self.student.losses(self.student.features(batch), batch, targets).losses

    def unsupervised_losses(
        self, unlabeled: Views, pseudo_labels: list[PseudoLabels]
    ) -> dict[str, Tensor]:
        """Return the student's weighted losses on strong views, named `*_unsup`."""
        learned = pseudo_labels
        if self.pseudo_label_filter.drops_undecided:
            rows = kept_rows([p.reliable for p in pseudo_labels])
            learned = [p[row] for p, row in zip(pseudo_labels, rows, strict=True)]
        batch = self.student.preprocess(unlabeled.strong)
        features = self.student.features(batch)
        main = self.student.losses(features, batch, [p.to_targets() for p in learned])
        losses = {
            name: loss
            for name, loss in main.losses.items()
            if self.unsup_box_losses or name not in BOX_LOSSES
        }
        if self.low_resolution is not None:
            losses |= self.low_resolution_losses(batch, features, main, pseudo_labels)
        return {f"{name}_unsup": self.unsup_loss_weight * loss for name, loss in losses.items()}

    def low_resolution_losses(
        self,
        batch: ImageBatch,
        features: Features,
        main: LossOutput,
        pseudo_labels: list[PseudoLabels],
    ) -> dict[str, Tensor]:
        """Return the losses of the second branch; arguments as it takes them."""
        assert self.low_resolution is not None, "there is no second branch"
        iterations = self.iteration - self.burn_in_iters
        return self.low_resolution(self.student, batch, features, main, pseudo_labels, iterations)


def _describe(pseudo_labels: list[PseudoLabels]) -> dict[str, Tensor]:
    """Sums an image, which may be averaged over iterations and ranks, whatever their boxes."""
    kept = PseudoLabels.cat(pseudo_labels)
    sums = {
        "num": kept.reliable,
        "undecided": ~kept.reliable,
        "score": kept.scores * kept.reliable,
        "weight": kept.weights * kept.reliable,
    }
    return {f"pseudo/{k}_per_image": v.sum() / len(pseudo_labels) for k, v in sums.items()}
