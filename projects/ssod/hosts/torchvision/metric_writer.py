"""Metrics of a run as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ssod.hosts.metric_log import LOG_NAME, read_metrics, truncate_metrics


def read_evaluation(output_dir: str | Path, iteration: int) -> dict[str, float]:
    """Return the metrics that a run has measured at an iteration; empty if none."""
    for line in read_metrics(output_dir):
        if line["iteration"] == iteration and "student/AP" in line:
            return {name: value for name, value in line.items() if name != "iteration"}
    return {}


class MetricLog(AbstractContextManager):
    """
    Writer of `metrics.json`, one JSON object a line, and of TensorBoard events.

    Args:
        output_dir: folder of the run.
        iteration: where the run (re)starts; lines past it, which an interrupted run wrote after
            its last checkpoint, are removed because they will be written again.
    """

    def __init__(self, output_dir: Path, iteration: int):
        truncate_metrics(output_dir, iteration)
        self._file = (output_dir / LOG_NAME).open("a", buffering=1)
        self._events = SummaryWriter(output_dir, purge_step=iteration + 1)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Append scalars of one iteration."""
        self._file.write(json.dumps({"iteration": iteration} | values) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()
