"""The Detectron2 host's part of the commands; see `ssod.hosts.protocol`."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model

from ssod.hosts.detectron2.catalog import load_run_data, read_sets
from ssod.hosts.detectron2.defaults import check_config, get_config
from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN
from ssod.hosts.detectron2.run import Run, build_checked, find_checkpoint
from ssod.hosts.metric_log import LOG_NAME, read_metrics
from ssod.hosts.protocol import CONFIG_NAME, FinishedRun, check_same_config, copy_file
from ssod.progress import progress_bar

__all__ = ["get_config", "load_run_data", "read_sets"]  # with the functions below

_NAMES = {"APs": "AP_S", "APm": "AP_M", "APl": "AP_L", "time": "time/step"}


def train(cfg: CfgNode, title: str) -> FinishedRun:
    """Train a run to its end, from where it was; a bar takes the place of Detectron2's output."""
    check_same_config(cfg)
    # Its warnings are of category ids with gaps, which are fine, and the like.
    for name in ("detectron2", "fvcore", "ssod.hosts.detectron2"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run = Run(cfg, find_checkpoint(cfg.OUTPUT_DIR))
    run.output.mkdir(parents=True, exist_ok=True)
    (run.output / CONFIG_NAME).write_text(cfg.dump())
    done, total = run.model.iteration, cfg.SOLVER.MAX_ITER
    with progress_bar(total=total, initial=done, desc=title, unit="it") as bar:
        progress = hooks.CallbackHook(after_step=lambda trainer: bar.update())
        with contextlib.redirect_stdout(io.StringIO()):
            results = run.train([progress])
    return FinishedRun(run.model, run.data, run.device, _rename(flatten_results_dict(results)))


def branch(source: Path, target: Path) -> None:
    """Start a run from the end of another, unless it has begun already."""
    if not find_checkpoint(str(target)):
        checkpoint = Path(find_checkpoint(str(source)))
        copy_file(source / LOG_NAME, target / LOG_NAME)
        copy_file(checkpoint, target / "burn_in.pth")
        (target / "last_checkpoint").write_text("burn_in.pth")


def read_log(cfg: CfgNode) -> list[dict[str, float]]:
    """Return the lines of a run's log, with the number of iterations done at each."""
    lines = [_rename(line) for line in read_metrics(cfg.OUTPUT_DIR)]
    return [line | {"iteration": line["iteration"] + 1} for line in lines]  # counted from 0


def last_checkpoint(run: Path) -> Path:
    """Return where the last checkpoint of a run is, if it has any."""
    return Path(find_checkpoint(str(run)) or run / "model_final.pth")


def build(cfg: CfgNode) -> TeacherStudentRCNN:
    """Build student and teacher on the config's device."""
    check_config(cfg)
    return build_checked(build_model, cfg)


def _rename(metrics: dict[str, float]) -> dict[str, float]:
    renamed = {}
    for name, value in metrics.items():
        group, _, last = name.replace("bbox/", "").rpartition("/")
        last = _NAMES.get(last, last)
        renamed[f"{group}/{last}" if group else last] = value
    return renamed
