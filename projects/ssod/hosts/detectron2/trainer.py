"""The training step on Detectron2: a `SimpleTrainer` for Detectron2's hooks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from ssod.core.distributed import get_rank, get_world_size, mean_over_ranks, seed_step
from ssod.core.structures import TwoStreamBatch, Views
from ssod.data.loader import FailedImages
from ssod.errors import InputError
from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN
from ssod.hosts.detectron2.solver import Clipper
from ssod.hosts.monitor import WeightAlarm, divide_sums

# `TrainerBase.train` logs a traceback of whatever ends it; an input error is told in one line.
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], InputError))
)


class TeacherStudentTrainer(SimpleTrainer):
    """
    One optimizer step an iteration, with mixed precision, accumulation and a non-finite guard.

    Nothing here waits for the device except every `log_period` iterations, when the metrics of all
    of them are reduced over ranks and copied to the host together. A step whose gradients are not
    finite is skipped on the device; the iteration counts, the EMA included.

    Args:
        model: `TeacherStudentRCNN`, or one in `DistributedDataParallel`.
        data_loader: of `TwoStreamBatch`, from the model's iteration on.
        optimizer: a fused one; see `ssod.hosts.detectron2.solver`.
        seed: the draws of an iteration depend on it, the iteration and the rank alone.
        log_period: iterations between two lines of metrics.
        max_skipped_steps: steps skipped in a row after which training stops.
        failed: counts images that cannot be decoded.
        amp_dtype: autocast to it; None for fp32. Losses are scaled for fp16.
        accumulate_steps: parts that a batch is divided into; the loss is their mean.
        clipper: clips the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[TwoStreamBatch],
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        log_period: int,
        max_skipped_steps: int,
        failed: FailedImages,
        amp_dtype: torch.dtype | None = None,
        accumulate_steps: int = 1,
        clipper: Clipper | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        is_parallel = isinstance(model, DistributedDataParallel)
        self.teacher_student: TeacherStudentRCNN = model.module if is_parallel else model
        self.seed = seed
        self.log_period = log_period
        self.max_skipped_steps = max_skipped_steps
        self.failed = failed
        self.amp_dtype = amp_dtype
        self.accumulate_steps = accumulate_steps
        self.clipper = clipper
        self._device = self.teacher_student.device.type
        # In other precisions the scaler only does what it does for steps that are not finite.
        scale = {} if self._scales_losses else {"init_scale": 1.0}
        self.grad_scaler = torch.amp.GradScaler(self._device, **scale)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._window: dict[str, list[Tensor]] = defaultdict(list)
        self._finite: list[Tensor] = []
        self._file_names: list[list[str]] = []
        self._data_seconds = 0.0
        self.alarm = WeightAlarm(self.teacher_student.pseudo_label_filter.is_soft)
        self.num_skipped = self.num_skipped_in_row = 0  # as of the last line of metrics

    @property
    def _scales_losses(self) -> bool:
        return self.amp_dtype == torch.float16

    def run_step(self) -> None:
        """
        Train on one batch.

        Raises:
            InputError: at a log line, if too many steps in a row were skipped or too many images
                could not be decoded, on all ranks together; at once, if proposals are not finite.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self._data_seconds += time.perf_counter() - start
        self.failed.update(batch)
        self._file_names.append(batch.file_names)
        self.optimizer.zero_grad()
        had_teacher = self.teacher_student.teacher_started
        parts = split_batch(batch, self.accumulate_steps)
        for index, part in enumerate(parts):
            # Each part anew: how many draws a method takes must not change those of the next part.
            seed_step(self.seed, self.iter * len(parts) + index)
            self._backward(part, is_last=index == len(parts) - 1)
        self.after_backward()
        self._step()
        self.teacher_student.after_step()
        if self.teacher_student.teacher_started and not had_teacher:
            self.teacher_student.reset_branch_state(self.optimizer)
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter:
            self._write_window()

    def _backward(self, part: TwoStreamBatch, is_last: bool) -> None:
        is_parallel = isinstance(self.model, DistributedDataParallel)
        # Gradients are reduced over ranks once, with the last part.
        sync = self.model.no_sync() if is_parallel and not is_last else contextlib.nullcontext()
        autocast = torch.autocast(self._device, self.amp_dtype, enabled=self.amp_dtype is not None)
        with sync:
            with autocast:
                losses = self._forward(part)
            total = sum(losses.values())
            self.grad_scaler.scale(total / self.accumulate_steps).backward()
        values = losses | {"total_loss": total} | self.teacher_student.metrics
        for name, value in values.items():
            self._window[name].append(value.detach())

    def _forward(self, part: TwoStreamBatch) -> dict[str, Tensor]:
        try:
            return self.model(part)
        except FloatingPointError as error:  # Detectron2's, of proposals: the weights are lost
            reason = str(error).partition("\n")[0]
            raise InputError(self._diverged(self.iter, reason, self._file_names[-1])) from error

    @staticmethod
    def _diverged(iteration: int, reason: str, file_names: list[str]) -> str:
        return (
            f"iteration {iteration}: {reason}; the last checkpoint is kept. Lower "
            "SOLVER.BASE_LR, set SOLVER.CLIP_GRADIENTS.ENABLED True, or look at the images of "
            f"this step: {', '.join(file_names)}"
        )

    def _step(self) -> None:
        self.grad_scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.clipper is not None:
            self.clipper(self._parameters, norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update(None if self._scales_losses else 1.0)
        self._window["grad_norm"].append(norm)
        self._finite.append(norm.isfinite())

    def _write_window(self) -> None:
        """Reduce what was collected since the last call, copy it to the host, and log it."""
        tensor = self._finite[0].new_tensor
        values = {name: _finite_mean(torch.stack(v)) for name, v in self._window.items()}
        values |= {f"finite/{i}": flag for i, flag in enumerate(self._finite)}
        world_size = get_world_size()
        counts = {"images/failed": self.failed.num_failed, "images/drawn": self.failed.num_drawn}
        # A place for each rank, of which the slowest is what all wait for.
        seconds = {f"seconds/{rank}": 0.0 for rank in range(world_size)}
        seconds[f"seconds/{get_rank()}"] = self._data_seconds / len(self._finite)
        values |= {k: tensor(v, dtype=torch.float64) for k, v in (counts | seconds).items()}
        mean = divide_sums(mean_over_ranks(values))
        finite = [mean.pop(f"finite/{i}") == 1 for i in range(len(self._finite))]
        num_failed, num_drawn = (round(mean.pop(name) * world_size) for name in counts)
        mean["data_time"] = max(mean.pop(name) * world_size for name in seconds)
        self._count_skipped(finite)
        mean["skipped_steps"] = self.num_skipped
        if self._scales_losses:
            mean["grad_scale"] = self.grad_scaler.get_scale()
        if comm.is_main_process():
            self.alarm.update(self.iter, mean)
            self.storage.put_scalars(smoothing_hint=False, **mean)
        self._window.clear()
        self._finite.clear()
        self._file_names.clear()
        self._data_seconds = 0.0
        self.failed.check(num_failed, num_drawn)

    def _count_skipped(self, finite: Sequence[bool]) -> None:
        for index, is_finite in enumerate(finite):
            self.num_skipped += not is_finite
            self.num_skipped_in_row = 0 if is_finite else self.num_skipped_in_row + 1
            if self.num_skipped_in_row >= self.max_skipped_steps:
                iteration = self.iter + 1 - len(finite) + index
                reason = (
                    f"the gradients of {self.num_skipped_in_row} steps in a row were not finite "
                    "(SSOD.MAX_SKIPPED_STEPS)"
                )
                # All ranks are here; the cause may be an image of any of them.
                files = sum(comm.all_gather(self._file_names[index]), [])
                raise InputError(self._diverged(iteration, reason, files))

    def state_dict(self) -> dict[str, Any]:
        """Add the loss scale, skipped steps, and which optimizer the state is of."""
        return super().state_dict() | {
            "grad_scaler": self.grad_scaler.state_dict(),
            "skipped": [self.num_skipped, self.num_skipped_in_row],
            "optimizer_name": type(self.optimizer).__name__,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned, but for learning rate, momentum and weight decay.

        Those are of the config, which may have been changed for what is left of the training.

        Raises:
            InputError: for the state of another optimizer, or for other parameters.
        """
        name = type(self.optimizer).__name__
        if state_dict.get("optimizer_name") != name:
            raise InputError(
                f"the checkpoint's optimizer is {state_dict.get('optimizer_name')}, but "
                f"SSOD.OPTIMIZER asks for {name}: set it as it was"
            )
        groups = [dict(group) for group in self.optimizer.param_groups]
        try:
            # The one hook with a state is the schedule, a function of the iteration alone.
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "hooks"})
        except ValueError as error:
            raise InputError(
                f"the checkpoint's optimizer does not fit: {error}; set the model's keys, and "
                "SSOD.LSM.ENABLED and HEAD, as they were"
            ) from error
        for loaded, group in zip(self.optimizer.param_groups, groups, strict=True):
            loaded.update({k: v for k, v in group.items() if k != "params"})
        self.num_skipped, self.num_skipped_in_row = state_dict["skipped"]
        # A run without loss scaling has a scale of 1, which would take long to grow.
        if self._scales_losses and state_dict["grad_scaler"]["scale"] != 1.0:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def split_batch(batch: TwoStreamBatch, parts: int) -> list[TwoStreamBatch]:
    """
    Divide both streams of a batch into equal parts, in order.

    Raises:
        ValueError: if a stream cannot be divided evenly.
    """
    labeled = _split_views(batch.labeled, parts)
    unlabeled = _split_views(batch.unlabeled, parts) if batch.unlabeled else [None] * parts
    return [TwoStreamBatch(a, b, []) for a, b in zip(labeled, unlabeled, strict=True)]


def _split_views(views: Views, parts: int) -> list[Views]:
    if len(views) % parts:
        raise ValueError(f"{len(views)} images cannot be divided into {parts} equal parts")
    size = len(views) // parts
    slices = [slice(start, start + size) for start in range(0, len(views), size)]
    return [
        Views(
            views.weak[s],
            views.strong[s],
            None if views.targets is None else views.targets[s],
            views.image_ids[s],
        )
        for s in slices
    ]


def _finite_mean(values: Tensor) -> Tensor:
    """Mean of the finite ones, nan if there are none."""
    finite = values.isfinite()
    return values.where(finite, 0).sum() / finite.sum()
