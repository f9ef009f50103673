"""
Detectron2's hooks, changed where a resumed run would differ from an uninterrupted one.

None has a state of its own to save: what earlier starts of a run did is read from its folder.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from detectron2.engine import hooks
from fvcore.common.checkpoint import Checkpointer

from ssod.hosts.checkpoint import read_checkpoint
from ssod.hosts.metric_log import read_metrics

_PERIODIC = re.compile(r"model_\d{7}\.pth")
BEST_CHECKPOINT = "model_best"


class KeepingPeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Saves every `period` iterations and keeps the last `max_to_keep`, also of earlier starts."""

    def before_train(self) -> None:
        """Find the checkpoints that are there."""
        super().before_train()
        files = self.checkpointer.get_all_checkpoint_files()
        self.recent_checkpoints = sorted(f for f in files if _PERIODIC.fullmatch(Path(f).name))


class EvalAfterStepHook(hooks.EvalHook):
    """
    Evaluates every `eval_period` iterations and with the last one; 0 for the last one alone.

    Detectron2's evaluates after the last iteration. So it would log the result under the number of
    an iteration that does not exist, and evaluate when that iteration has failed, too.
    """

    def after_step(self) -> None:
        """Evaluate if it is time to."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0):
            self._do_eval()

    def after_train(self) -> None:
        """Do nothing: it is done."""


class ResumedBestCheckpointer(hooks.BestCheckpointer):
    """
    Saves `model_best.pth` when a metric is higher than ever, also in earlier starts of the run.

    Comes after `EvalAfterStepHook`. Detectron2's forgets what was best before a resume.

    Args:
        checkpointer: saves.
        metric: its name in the event storage and in the log of the run.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str):
        super().__init__(0, checkpointer, metric, file_prefix=BEST_CHECKPOINT)

    def before_train(self) -> None:
        """Find the best value that the run has saved or logged."""
        folder = Path(self._checkpointer.save_dir)
        lines = read_metrics(folder)
        path = folder / f"{BEST_CHECKPOINT}.pth"
        if path.exists():
            # The log is written later than the file, and may lack its value after a kill.
            lines.append(read_checkpoint(path).get("best", {}))
        values = [line[self._val_metric] for line in lines if self._val_metric in line]
        self.best_metric = max([v for v in values if math.isfinite(v)], default=-math.inf)

    def after_step(self) -> None:
        """Save if this iteration was evaluated and is the best."""
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, -1))
        is_best = iteration == self.trainer.iter and value > self.best_metric
        if is_best and self._update_best(value, iteration):
            self._checkpointer.save(BEST_CHECKPOINT, best={self._val_metric: float(value)})

    def after_train(self) -> None:
        """Do nothing: it is done."""
