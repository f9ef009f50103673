"""
Hooks beside Detectron2's own.

None has a state of its own to save: what earlier starts of a run did is read from its folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from ssod.hosts.metric_log import read_metrics

_PERIODIC = re.compile(r"model_\d{7}\.pth")
BEST_CHECKPOINT = "model_best"


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Saves every `period` iterations and keeps the last `max_to_keep`, also of earlier starts."""

    def before_train(self) -> None:
        """Find the checkpoints that are there."""
        super().before_train()
        files = self.checkpointer.get_all_checkpoint_files()
        self.recent_checkpoints = sorted(f for f in files if _PERIODIC.fullmatch(Path(f).name))


class EvalHook(HookBase):
    """
    Evaluates every `period` iterations and with the last one, on all ranks.

    Detectron2's evaluates after the last iteration. So it would log the result under the number of
    an iteration that does not exist, and evaluate when that iteration has failed, too.

    Args:
        period: in iterations; 0 for the last one alone.
        function: returns nested results; empty on all ranks but the first.
    """

    def __init__(self, period: int, function: Callable[[], dict[str, Any]]):
        self._period = period
        self._function = function

    def after_step(self) -> None:
        """Evaluate if it is time to."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0):
            results = flatten_results_dict(self._function())
            self.trainer.storage.put_scalars(**results, smoothing_hint=False)
            comm.synchronize()


class BestCheckpointer(HookBase):
    """
    Saves `model_best.pth` whenever a metric is higher than ever before; comes after `EvalHook`.

    Args:
        checkpointer: saves.
        metric: its name in the event storage and in the log of the run.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str):
        self._checkpointer = checkpointer
        self._metric = metric
        self._best = -math.inf

    def before_train(self) -> None:
        """Find the best value that the run has logged."""
        lines = read_metrics(self._checkpointer.save_dir)
        values = [line[self._metric] for line in lines if self._metric in line]
        self._best = max([v for v in values if math.isfinite(v)], default=-math.inf)

    def after_step(self) -> None:
        """Save if this iteration was evaluated and is the best."""
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        if iteration == self.trainer.iter and value > self._best:
            self._best = value
            self._checkpointer.save(BEST_CHECKPOINT)
