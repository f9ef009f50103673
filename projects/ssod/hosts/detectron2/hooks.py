"""Detectron2's checkpoint hooks, made to survive a resume: what they know is read from disk."""

from __future__ import annotations

import math
import re
from pathlib import Path

from detectron2.engine import hooks

from ssod.hosts.metric_log import read_metrics

_PERIODIC = re.compile(r"model_\d{7}\.pth")


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Saves every `period` iterations and keeps the last `max_to_keep`, also of earlier starts."""

    def before_train(self) -> None:
        """Find the checkpoints that are there."""
        super().before_train()
        files = self.checkpointer.get_all_checkpoint_files()
        self.recent_checkpoints = sorted(f for f in files if _PERIODIC.fullmatch(Path(f).name))


class BestCheckpointer(hooks.BestCheckpointer):
    """
    Saves `model_best.pth` whenever a metric has not been higher before.

    Args:
        eval_period: of the evaluation hook, which must come first.
        checkpointer: saves.
        val_metric: its name in the event storage and in the log of the run.
    """

    def __init__(self, eval_period: int, checkpointer: hooks.Checkpointer, val_metric: str):
        super().__init__(eval_period, checkpointer, val_metric)
        self._metric = val_metric
        self._output_dir = checkpointer.save_dir

    def before_train(self) -> None:
        """Find the best value that the run has logged."""
        lines = [line for line in read_metrics(self._output_dir) if self._metric in line]
        lines = [line for line in lines if math.isfinite(line[self._metric])]
        if lines:
            best = max(lines, key=lambda line: line[self._metric])
            self.best_metric, self.best_iter = best[self._metric], best["iteration"]
