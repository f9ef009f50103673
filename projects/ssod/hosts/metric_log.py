"""The metrics of a run as JSON lines, whichever host writes them."""

from __future__ import annotations

import json
from pathlib import Path

from ssod.files import replacing

LOG_NAME = "metrics.json"


def read_metrics(output_dir: str | Path) -> list[dict[str, float]]:
    """
    Read the lines of a run's `metrics.json`, each with its `iteration`; empty if none exists.

    The end of a line that an interruption cut off is left out.
    """
    path = Path(output_dir) / LOG_NAME
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


def truncate_metrics(output_dir: str | Path, last_iteration: int) -> None:
    """Remove what an interrupted run wrote past an iteration and will write again."""
    kept = [line for line in read_metrics(output_dir) if line["iteration"] <= last_iteration]
    with replacing(Path(output_dir) / LOG_NAME) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
