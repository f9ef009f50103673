"""What the runs of all hosts have in common: what they start from, and what they measure."""

from __future__ import annotations

import argparse
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from ssod.core.distributed import get_rank, get_world_size
from ssod.core.ema import update_ema
from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import RunData
from ssod.data.datasets import DetectionDataset
from ssod.errors import InputError
from ssod.hosts.checkpoint import is_run_checkpoint, load_teacher_student
from ssod.hosts.monitor import choose_monitored, monitor_pseudo_labels
from ssod.hosts.step import TrainingStep
from ssod.hosts.sweep import tell_labels

logger = logging.getLogger(__name__)


class BaseRun(ABC):
    """
    One run under `OUTPUT_DIR`; every rank makes its own.

    Args:
        cfg: of the host, merged and final.
        checkpoint: file of a run to continue or evaluate; "" to start from `MODEL.WEIGHTS`.
        for_training: False for evaluation alone, which needs no training images.

    Attributes:
        data: sets it is trained on, None if it is only evaluated.
        model: student and teacher.
        step: what is done in an iteration; only of a run that trains.

    Raises:
        InputError: for anything in the config, the data or the checkpoint that cannot be used,
            before training starts.
    """

    def __init__(self, cfg: CfgNode, checkpoint: str | Path = "", for_training: bool = True):
        self.cfg = cfg
        self.output = Path(cfg.OUTPUT_DIR)
        self.device = usable_device(cfg)
        if for_training:
            _check_parts(cfg)
        self.data: RunData | None = self._load_data() if for_training else None
        torch.manual_seed(cfg.SEED)
        self.model = self._build_model()
        state = self._read_checkpoint(checkpoint) if checkpoint else {}
        if checkpoint:
            load_teacher_student(self.model, state["model"], checkpoint)
            logger.info("%s is at iteration %d", checkpoint, self.model.iteration)
        elif cfg.MODEL.WEIGHTS:
            self._load_weights(cfg.MODEL.WEIGHTS)
            update_ema(self.model.teacher, self.model.student, decay=0.0)
        if self.data is not None:
            tell_labels(self.model, self.data)
            self.step = self._build_step()
            if checkpoint:
                self.step.load_state_dict(state.get("trainer", state), checkpoint)

    @abstractmethod
    def _load_data(self) -> RunData:
        """Read the sets of the config."""

    @abstractmethod
    def _build_model(self) -> TeacherStudent:
        """Build student, teacher, filter and methods with initial weights on the device."""

    @abstractmethod
    def _build_step(self) -> TrainingStep:
        """Build the step, with the host's optimizer."""

    @abstractmethod
    def _load_weights(self, path: str) -> None:
        """Load `MODEL.WEIGHTS` into the student."""

    @abstractmethod
    def _read_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Return the content of a run's checkpoint, with `model`."""

    @abstractmethod
    def _measure(self) -> dict[str, Any]:
        """Return the results of student and teacher on the validation images."""

    def evaluate(self) -> dict[str, Any]:
        """
        Measure the student and, once it has started, the teacher; every rank must call it.

        Returns:
            the host's results, in percent, under `student` and `teacher`; in a training also
            `pseudo/precision` and so on where hidden truth is known. Empty without a validation
            set, and on all ranks but the first. Predictions are written to `OUTPUT_DIR/inference`.
        """
        results = self._measure()
        if results and self.data is not None and get_rank() == 0:
            labeled_counts = torch.from_numpy(self.data.labeled.class_counts)
            results |= monitor_pseudo_labels(
                self.model, self._monitored, labeled_counts, self.cfg, self.device
            )
        return results

    @cached_property
    def _monitored(self) -> DetectionDataset | None:
        return choose_monitored(self.data.hidden_truth)


def detectors_of(model: TeacherStudent) -> dict[str, torch.nn.Module]:
    """Return the student and, once it has started, the teacher, by name."""
    return {"student": model.student} | (
        {"teacher": model.teacher} if model.teacher_started else {}
    )


def usable_device(cfg: CfgNode) -> torch.device:
    """
    Return the device of `MODEL.DEVICE`, "auto" for cuda where there is one.

    Raises:
        InputError: if it is not there, or cannot do what the config asks for.
    """
    name, has_cuda = cfg.MODEL.DEVICE, torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if has_cuda else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"MODEL.DEVICE {name!r} cannot be used here; set it to cpu") from error
    if cfg.SSOD.AMP_DTYPE not in ("float16", "bfloat16"):
        raise InputError(
            f'SSOD.AMP_DTYPE must be "float16" or "bfloat16", got {cfg.SSOD.AMP_DTYPE!r}'
        )
    is_bfloat16 = cfg.SOLVER.AMP.ENABLED and cfg.SSOD.AMP_DTYPE == "bfloat16"
    if is_bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise InputError(
            f"{torch.cuda.get_device_name(device)} does not have bfloat16; set SSOD.AMP_DTYPE "
            "float16, or SOLVER.AMP.ENABLED False"
        )
    return device


def _check_parts(cfg: CfgNode) -> None:
    """Make sure that both batches can be divided among processes and passes."""
    world_size, passes = get_world_size(), cfg.SSOD.ACCUMULATE_STEPS
    for key, batch in (
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH),
        ("SSOD.DATA.UNLABELED_PER_BATCH", cfg.SSOD.DATA.UNLABELED_PER_BATCH),
    ):
        if batch % (passes * world_size):
            raise InputError(
                f"{key} must be a multiple of the number of processes times "
                f"SSOD.ACCUMULATE_STEPS, {world_size} x {passes}, got {batch}"
            )


def choose_checkpoint(
    cfg: CfgNode,
    last: str | Path,
    args: argparse.Namespace,
    fetch: Callable[[str], str] = str,
) -> str | Path:
    """
    Return the checkpoint of a run to continue or evaluate, "" to start from `MODEL.WEIGHTS`.

    Args:
        cfg: of the run.
        last: its last checkpoint, "" if it has none.
        args: `resume`, `eval_only` and `opts` of the command line.
        fetch: turns a URL into a file, where the host knows URLs.

    Raises:
        InputError: if there is one that was not asked for, or none to evaluate.
    """
    if not args.eval_only:
        if last and not args.resume:
            raise InputError(
                f"{last} is of an earlier run; continue it with --resume, or choose another "
                "OUTPUT_DIR"
            )
        return last
    # Configs name weights to start from, so only those of the command line are meant.
    if "MODEL.WEIGHTS" in args.opts[::2] and not args.resume:
        weights = fetch(cfg.MODEL.WEIGHTS)
        return weights if is_run_checkpoint(weights) else ""
    if not last:
        raise InputError(
            f"--eval-only found no checkpoint in {cfg.OUTPUT_DIR}; set OUTPUT_DIR to that of a "
            "run, or add MODEL.WEIGHTS FILE"
        )
    return last
