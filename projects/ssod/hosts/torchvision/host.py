"""The torchvision host's part of the commands; see `ssod.hosts.protocol`."""

from __future__ import annotations

from pathlib import Path

from fvcore.common.config import CfgNode

from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import load_run_data, read_sets
from ssod.hosts.metric_log import LOG_NAME, read_metrics
from ssod.hosts.protocol import FinishedRun, check_same_config, copy_file
from ssod.hosts.run import usable_device
from ssod.hosts.torchvision.build import build_model
from ssod.hosts.torchvision.defaults import get_config
from ssod.hosts.torchvision.run import CHECKPOINT_NAME, Run, find_checkpoint

__all__ = ["get_config", "load_run_data", "read_sets"]  # with the functions below


def train(cfg: CfgNode, title: str) -> FinishedRun:
    """Train a run to its end, from where it was."""
    check_same_config(cfg)
    run = Run(cfg, find_checkpoint(cfg.OUTPUT_DIR))
    results = run.train(title)
    return FinishedRun(run.model, run.data, run.device, results)


def branch(source: Path, target: Path) -> None:
    """Start a run from the end of another, unless it has begun already."""
    if not (target / CHECKPOINT_NAME).exists():
        copy_file(source / LOG_NAME, target / LOG_NAME)
        copy_file(source / CHECKPOINT_NAME, target / CHECKPOINT_NAME)


def read_log(cfg: CfgNode) -> list[dict[str, float]]:
    """Return the lines of a run's log."""
    return read_metrics(cfg.OUTPUT_DIR)


def last_checkpoint(run: Path) -> Path:
    """Return where the last checkpoint of a run is, if it has any."""
    return run / CHECKPOINT_NAME


def build(cfg: CfgNode) -> TeacherStudent:
    """Build student and teacher, with random weights, on the config's device."""
    return build_model(cfg).to(usable_device(cfg))
