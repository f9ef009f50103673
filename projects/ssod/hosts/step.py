"""
The training step of every host: one optimizer step an iteration.

Neither Detectron2's trainers nor torchvision's reference loop have what a run here promises, so
each host's loop is a thin one around this.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from ssod.core.distributed import get_rank, get_world_size, seed_step
from ssod.core.structures import TwoStreamBatch
from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import RunData
from ssod.data.loader import FailedImages
from ssod.errors import InputError
from ssod.hosts.checkpoint import load_optimizer
from ssod.hosts.metric_window import MetricWindow
from ssod.hosts.monitor import BoundAlarm, WeightAlarm
from ssod.hosts.optimizer import build_clipper
from ssod.hosts.sweep import sweep_if_due


class TrainingStep:
    """
    Trains on one batch: mixed precision, accumulation, clipping, non-finite guard, EMA, metrics.

    Nothing here waits for the device but `state_dict` and `read_metrics`, which reduces those of
    all iterations since the last call over ranks and copies them to the host together. A step
    whose gradients are not finite is skipped on the device; the iteration counts, the EMA included.

    Args:
        cfg: `SEED`, `SOLVER.AMP`, `SOLVER.CLIP_GRADIENTS`, and the keys of `SSOD` named below.
        model: `TeacherStudent`, or one in `DistributedDataParallel`.
        optimizer: from `ssod.hosts.optimizer`, over every parameter that requires a gradient.
        data: of the run, for filters that ask for sweeps.

    Attributes:
        model: the `TeacherStudent`.
        grad_scaler: scales losses with `SSOD.AMP_DTYPE` float16.
        num_skipped: steps that were not finite, as of the last `read_metrics`.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer, data: RunData
    ):
        is_parallel = isinstance(model, DistributedDataParallel)
        self.model: TeacherStudent = model.module if is_parallel else model
        self.optimizer = optimizer
        self._forward = model
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in self._parameters}, "all that is trainable, and nothing else"
        self._cfg = cfg
        self._data = data
        self._device = self._parameters[0].device
        has_amp = cfg.SOLVER.AMP.ENABLED
        self._amp_dtype = getattr(torch, cfg.SSOD.AMP_DTYPE) if has_amp else None
        self._scales_losses = self._amp_dtype == torch.float16
        # In other precisions the scaler only does what it does for steps that are not finite.
        scale = {} if self._scales_losses else {"init_scale": 1.0}
        self.grad_scaler = torch.amp.GradScaler(self._device.type, **scale)
        self._clip = build_clipper(cfg)
        self._failed = FailedImages(cfg.SSOD.DATA.MAX_FAILED_SHARE)
        self._alarms = (WeightAlarm(self.model.pseudo_label_filter.is_soft), BoundAlarm())
        self._window = MetricWindow()
        self._file_names: list[list[str]] = []
        self.num_skipped = self._num_skipped_in_row = 0

    def prepare(self) -> None:
        """Start the teacher and make a sweep, if they are due; call it before each iteration."""
        self.model.start_teacher_if_due()
        sweep_if_due(self.model, self._data, self._cfg, self._device)

    def __call__(self, batch: TwoStreamBatch) -> None:
        """
        Train on this rank's batch of an iteration, images on any device.

        Raises:
            InputError: if the host's detector finds that the weights are lost.
        """
        self._failed.update(batch)
        self._file_names.append(batch.file_names)
        self.optimizer.zero_grad()
        parts = batch.split(self._cfg.SSOD.ACCUMULATE_STEPS)
        for index, part in enumerate(parts):
            # Each part anew: how many draws a method takes must not change those of the next part.
            seed_step(self._cfg.SEED, self.model.iteration * len(parts) + index)
            self._backward(part, len(parts), is_last=index == len(parts) - 1)
        self._update()
        self.model.after_step()
        self.model.start_teacher_if_due()  # what is saved or evaluated next has it

    def _backward(self, part: TwoStreamBatch, num_parts: int, is_last: bool) -> None:
        is_parallel = isinstance(self._forward, DistributedDataParallel)
        # Gradients are reduced over ranks once, with the last part.
        sync = self._forward.no_sync() if is_parallel and not is_last else contextlib.nullcontext()
        dtype = self._amp_dtype
        with sync:
            with torch.autocast(self._device.type, dtype, enabled=dtype is not None):
                losses = self._losses(part.to(self._device, non_blocking=True))
            total = sum(losses.values())
            self.grad_scaler.scale(total / num_parts).backward()
        self._window.add(losses | {"total_loss": total} | self.model.metrics)

    def _losses(self, part: TwoStreamBatch) -> dict[str, Tensor]:
        try:
            return self._forward(part)
        except FloatingPointError as error:  # Detectron2's, of proposals
            reason = str(error).partition("\n")[0]
            names = self._file_names[-1]
            raise InputError(_diverged(self.model.iteration, reason, names)) from error

    def _update(self) -> None:
        if not self.model.uses_unlabeled:
            # Nothing was learned there. With gradients of zero, which several processes need to
            # agree, weight decay would shrink them, and Adam count steps with a variance of 0.
            for parameter in self.model.methods.parameters():
                parameter.grad = None
        self.grad_scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip is not None:
            self._clip(self._parameters, norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update(None if self._scales_losses else 1.0)
        self._window.add({"grad_norm": norm})
        self._window.add_flag(norm.isfinite())

    @property
    def is_log_due(self) -> bool:
        """Whether the metrics are to be read after this iteration."""
        done = self.model.iteration
        return done % self._cfg.SSOD.LOG_PERIOD == 0 or done == self._cfg.SOLVER.MAX_ITER

    def read_metrics(self, **seconds: float) -> dict[str, float]:
        """
        Return the means over the iterations since the last call, and over ranks; waits for them.

        Args:
            **seconds: of this rank, an iteration; what is returned is the slowest rank's.

        Raises:
            InputError: on all ranks together, if too many steps in a row were skipped or too many
                images could not be decoded.
        """
        counts = [self._failed.num_failed, self._failed.num_drawn]
        values, finite, (num_failed, num_drawn) = self._window.read(counts, seconds)
        self._count_skipped(finite)
        values["skipped_steps"] = self.num_skipped
        if self._scales_losses:
            values["grad_scale"] = self.grad_scaler.get_scale()
        if get_rank() == 0:
            for alarm in self._alarms:
                alarm.update(self.model.iteration, values)
        self._file_names.clear()
        self._failed.check(num_failed, num_drawn)
        return values

    def _count_skipped(self, finite: list[bool]) -> None:
        for index, is_finite in enumerate(finite):
            self.num_skipped += not is_finite
            self._num_skipped_in_row = 0 if is_finite else self._num_skipped_in_row + 1
            if self._num_skipped_in_row >= self._cfg.SSOD.MAX_SKIPPED_STEPS:
                reason = (
                    f"the gradients of {self._num_skipped_in_row} steps in a row were not finite "
                    "(SSOD.MAX_SKIPPED_STEPS)"
                )
                iteration = self.model.iteration - len(finite) + index
                # All ranks are here; the cause may be an image of any of them.
                raise InputError(_diverged(iteration, reason, _gather(self._file_names[index])))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: of optimizer and loss scale, and metrics to be read."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "grad_scaler": self.grad_scaler.state_dict(),
            "skipped": [self.num_skipped, self._num_skipped_in_row],
            "window": self._window.state_dict() | {"file_names": self._file_names},
        }

    def load_state_dict(self, state: dict[str, Any], source: object) -> None:
        """
        Restore what `state_dict` returned, but for learning rate, momentum and weight decay.

        Args:
            state: of a checkpoint; those of earlier versions may be without the last three entries.
            source: what errors call the checkpoint.

        Raises:
            InputError: for the state of another optimizer, or for other parameters.
        """
        load_optimizer(self.optimizer, state, source)
        if not self.model.teacher_started:
            # Earlier versions let the optimizer count gradients of zero as steps.
            for parameter in self.model.methods.parameters():
                for value in self.optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor):
                        value.zero_()
        self.num_skipped, self._num_skipped_in_row = state.get("skipped", (0, 0))
        if "window" in state:
            self._window.load_state_dict(state["window"], self._device)
            self._file_names = list(state["window"]["file_names"])
        # A run without loss scaling has a scale of 1, which would take long to grow.
        scaler = state.get("grad_scaler", {})
        if self._scales_losses and scaler.get("scale", 1.0) != 1.0:
            self.grad_scaler.load_state_dict(scaler)


def _diverged(iteration: int, reason: str, file_names: list[str]) -> str:
    return (
        f"iteration {iteration}: {reason}; the last checkpoint is kept. Lower SOLVER.BASE_LR, set "
        "SOLVER.CLIP_GRADIENTS.ENABLED True, or look at the images of this step: "
        f"{', '.join(file_names)}"
    )


def _gather(names: list[str]) -> list[str]:
    """Return the names of all ranks, in their order."""
    if get_world_size() == 1:
        return names
    found: list[list[str]] = [[] for _ in range(get_world_size())]
    dist.all_gather_object(found, names)
    return [name for part in found for name in part]
