"""Checkpoints of a run: written atomically, read without unpickling code, checked by name."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pth"


def save_checkpoint(
    path: str | Path, model: TeacherStudent, optimizer: torch.optim.Optimizer, config: str
) -> None:
    """
    Write a run's state, replacing an older file only once the new one is complete.

    Args:
        path: file to write.
        model: student, teacher, filter and iteration.
        optimizer: its state and its name go with the model's.
        config: the resolved config as YAML, for people and for later loading.
    """
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizer_name": type(optimizer).__name__,
        "config": config,
    }
    partial = Path(f"{path}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    Read a file written by `torch.save` onto the CPU; only tensors and plain containers load.

    Raises:
        InputError: if the file is missing, damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: checkpoint not found")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files make torch raise nearly any of these, some of them without a message.
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
    ) as error:
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise InputError(
            f"{path}: not a checkpoint that can be read ({reason}); "
            "it may be truncated or of another program"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a checkpoint dictionary, got {type(state).__name__}")
    return state


def load_matching(module: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """
    Load a state dict in which every name and shape must match.

    Raises:
        InputError: for a checkpoint of another architecture, naming the first mismatch.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not part of this model" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, this config builds {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise InputError(
            f"{path}: checkpoint of another architecture ({len(problems)} mismatches): "
            f"{problems[0]}. "
            "Use the config it was trained with."
        )
    module.load_state_dict(state)


def load_detector_weights(detector: nn.Module, path: str | Path) -> None:
    """
    Load weights for `MODEL.WEIGHTS`.

    A box predictor for another number of classes keeps its initial weights, with one line logged.

    Args:
        detector: model to fill.
        path: a checkpoint of a run, of which the teacher is taken, or the student if the teacher
            had not started; a state dict of torchvision's FasterRCNN; or one of a torchvision
            ResNet, which fills the backbone's body.

    Raises:
        InputError: as `read_checkpoint` and `load_matching`; every other weight must match.
    """
    state = read_checkpoint(path)
    state = state.get("model", state)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a state dict of tensors")
    if "_extra_state" in state:  # of `TeacherStudent`
        _, teacher_started = state["_extra_state"].tolist()
        prefix = "teacher." if teacher_started else "student."
        state = {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}
    if "conv1.weight" in state:
        body = {name: v for name, v in state.items() if not name.startswith("fc.")}
        load_matching(detector.backbone.body, _with_counters(detector.backbone.body, body), path)
        return
    own = detector.state_dict()
    other = [
        name
        for name in own
        if name.startswith("roi_heads.box_predictor.")
        and name in state
        and state[name].shape != own[name].shape
    ]
    if other:
        logger.info("%s: box predictor is for other classes and starts anew", path)
    state = state | {name: own[name] for name in other}
    load_matching(detector, _with_counters(detector, state), path)


def _with_counters(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Add or drop the batch counters of BN, which frozen norms do not have and nothing needs."""
    suffix = "num_batches_tracked"
    own = {name: v for name, v in module.state_dict().items() if name.endswith(suffix)}
    return own | {name: v for name, v in state.items() if name in own or not name.endswith(suffix)}
