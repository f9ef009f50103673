"""Checkpoint files of any host: read without unpickling code, and matched name by name."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError

logger = logging.getLogger(__name__)


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


def load_teacher_student(model: TeacherStudent, state: dict[str, Any], path: str | Path) -> None:
    """
    Load the model of a run that is to be continued.

    If the checkpoint has another pseudo-label filter or second branch, the model's own starts anew,
    with one line logged. So filters can be exchanged during a run, and a run is evaluated without
    its branch; whether it can be trained without, or with another one, is up to the optimizer.

    Raises:
        InputError: as `load_matching`.
    """
    parts = {"pseudo_label_filter": "pseudo-label filter", "low_resolution": "second branch"}
    for part, title in parts.items():
        own = {name: v for name, v in model.state_dict().items() if name.startswith(f"{part}.")}
        saved = {name: v for name, v in state.items() if name.startswith(f"{part}.")}
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in saved.items()}:
            what = "the one set starts anew" if own else "it is left out"
            logger.info("%s: it has another %s; %s", path, title, what)
            state = {name: v for name, v in state.items() if name not in saved} | own
    load_matching(model, state, path)


def read_run(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint of a run, whose `model` has student and teacher.

    Raises:
        InputError: if it is of something else, and as `read_checkpoint`.
    """
    state = read_checkpoint(path)
    weights = state.get("model")
    if not isinstance(weights, dict) or "_extra_state" not in weights:
        raise InputError(f"{path}: expected a checkpoint of a run, which has student and teacher")
    return state


def load_run(model: TeacherStudent, path: str | Path) -> dict[str, Any]:
    """
    Load what a run has trained, to use it; returns the whole checkpoint.

    Raises:
        InputError: as `read_run` and `load_matching`.
    """
    state = read_run(path)
    load_teacher_student(model, state["model"], path)
    return state


def with_counters(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Add or drop the batch counters of BN, which frozen norms do not have and nothing needs."""
    suffix = "num_batches_tracked"
    own = {name: v for name, v in module.state_dict().items() if name.endswith(suffix)}
    return own | {name: v for name, v in state.items() if name in own or not name.endswith(suffix)}
