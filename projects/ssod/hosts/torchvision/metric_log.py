"""Metrics of a run as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "metrics.json"


def read_metrics(output_dir: str | Path) -> list[dict[str, float]]:
    """
    Read the lines of a run's `metrics.json`, each with its `iteration`; empty if none exists.

    The end of a line that an interruption cut off is left out.
    """
    path = Path(output_dir) / LOG_NAME
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


def read_evaluation(output_dir: str | Path, iteration: int) -> dict[str, float]:
    """Return the metrics that a run has measured at an iteration; empty if none."""
    for line in read_metrics(output_dir):
        if line["iteration"] == iteration and "student/AP" in line:
            return {name: value for name, value in line.items() if name != "iteration"}
    return {}


class MetricLog:
    """
    Writer of `metrics.json`, one JSON object a line, and of TensorBoard events.

    Args:
        output_dir: folder of the run.
        iteration: where the run (re)starts; lines past it, which an interrupted run wrote after
            its last checkpoint, are removed because they will be written again.
    """

    def __init__(self, output_dir: Path, iteration: int):
        kept = [line for line in read_metrics(output_dir) if line["iteration"] <= iteration]
        path = output_dir / LOG_NAME
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(output_dir, purge_step=iteration + 1)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Append scalars of one iteration."""
        self._file.write(json.dumps({"iteration": iteration} | values) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()
