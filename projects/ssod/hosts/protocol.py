"""
What the commands need of a host, which offers it in its module `host`.

The functions there: `get_config()`, `train(cfg, title) -> FinishedRun`, `branch(source, target)`
to start a run from the end of another, `read_log(cfg)` with the torchvision host's names,
`last_checkpoint(run)`, `build(cfg) -> TeacherStudent` on its device with initial weights,
`load_run_data(cfg) -> RunData`, and `read_sets(cfg, on_problem)` for what it reads before any
split, as `ssod.data.build.read_sets`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import RunData
from ssod.errors import InputError
from ssod.files import replacing

CONFIG_NAME = "config.yaml"


@dataclass
class FinishedRun:
    """
    A run at its end.

    Attributes:
        model: student and teacher.
        data: the sets it was trained on.
        device: of the model.
        results: `student/AP`, `teacher/AP_S` and so on, in percent.
    """

    model: TeacherStudent
    data: RunData
    device: torch.device
    results: dict[str, float]


def check_same_config(cfg: CfgNode) -> None:
    """
    Make sure that what is in `OUTPUT_DIR` is of this config.

    Raises:
        InputError: if it is of another.
    """
    written = Path(cfg.OUTPUT_DIR) / CONFIG_NAME
    if written.exists() and written.read_text() != cfg.dump():
        raise InputError(
            f"{written} is of a run with another config; remove {cfg.OUTPUT_DIR} or choose "
            "another --output"
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file so that the target is complete or not there at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        shutil.copy(source, partial)
