"""`TrainingStep` as a trainer of Detectron2, for its hooks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ssod.core.structures import TwoStreamBatch
from ssod.hosts.step import TrainingStep


class TeacherStudentTrainer(SimpleTrainer):
    """
    Draws batches, trains on them, and puts metrics into the event storage.

    A `SimpleTrainer` for what Detectron2's hooks expect of one. Its `run_step` is replaced, as it
    knows neither accumulation nor skipped steps, and waits for the device at each of them.

    Args:
        model: `TeacherStudentRCNN`, or one in `DistributedDataParallel`.
        data_loader: of `TwoStreamBatch`, from the model's iteration on.
        step: trains the model.
    """

    def __init__(self, model: nn.Module, data_loader: Iterable[TwoStreamBatch], step: TrainingStep):
        super().__init__(model, data_loader, step.optimizer)
        self.step = step
        self._data_seconds: list[float] = []

    def run_step(self) -> None:
        """
        Train on one batch.

        Raises:
            InputError: as `TrainingStep`.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self._data_seconds.append(time.perf_counter() - start)
        self.step(batch)
        if self.step.is_log_due:
            mean = sum(self._data_seconds) / len(self._data_seconds)
            self._data_seconds.clear()
            metrics = self.step.read_metrics(data_time=mean)
            if comm.is_main_process():
                self.storage.put_scalars(smoothing_hint=False, **metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the step, and what Detectron2 keeps beside it."""
        return super().state_dict() | self.step.state_dict()
