"""Checkpoint files of any host: read without unpickling code, and matched name by name."""

from __future__ import annotations

import logging
import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError

logger = logging.getLogger(__name__)

Which = Literal["teacher", "student"]


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

    Where the checkpoint has another pseudo-label filter or other methods, the model's own start
    anew, with one line logged. So filters can be exchanged during a run, and a run is evaluated
    without its methods; whether it can be trained without, or with others, is up to the optimizer.

    Raises:
        InputError: as `load_matching`.
    """
    # The first versions had the one method that there was in a place of its own.
    state = {re.sub(r"^low_resolution\.", "methods.LSM.", name): v for name, v in state.items()}
    own, saved = _by_part(model.state_dict()), _by_part(state)
    for part in sorted(own.keys() | saved.keys() - {""}):
        if part and _shapes(own.get(part)) != _shapes(saved.get(part)):
            what = "the one set starts anew" if part in own else "it is left out"
            title = part.replace("_label_", "-label ").replace("methods.", "method ")
            logger.info("%s: it has another %s; %s", path, title, what)
            saved[part] = own.get(part, {})
    load_matching(model, {n: v for part in saved.values() for n, v in part.items()}, path)


def _by_part(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Divide a state dict into the filter, each method, and the rest, whose name is ""."""
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in state.items():
        found = re.match(r"(pseudo_label_filter|methods\.[^.]+)\.", name)
        parts[found[1] if found else ""][name] = value
    return parts


def _shapes(state: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value.shape for name, value in (state or {}).items()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: object) -> None:
    """
    Load the state of a run's optimizer, but for learning rate, momentum and weight decay.

    Those are of the config, which may have been changed for what is left of the training. `state`
    has `optimizer` and `optimizer_name` of a checkpoint, which errors call `source`.

    Raises:
        InputError: for the state of another optimizer, or for other parameters.
    """
    name, groups = type(optimizer).__name__, [dict(group) for group in optimizer.param_groups]
    try:
        # Loading another optimizer's state succeeds; its first step would fail.
        if state.get("optimizer_name") != name:
            raise ValueError(f"it is {state.get('optimizer_name')}, SSOD.OPTIMIZER asks for {name}")
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise InputError(
            f"{source}: its optimizer does not fit: {error}; set SSOD.OPTIMIZER and the "
            "methods as they were"
        ) from error
    for loaded, group in zip(optimizer.param_groups, groups, strict=True):
        loaded.clear()  # of what a scheduler has left there, too
        loaded.update(group)


def detector_state(state: dict[str, Any], which: Which | None = None) -> dict[str, Any]:
    """
    Return the state dict of one of the two detectors in that of a `TeacherStudent`.

    Args:
        state: also of anything else, which is returned as it is.
        which: None for the teacher if it has started, otherwise the student.
    """
    if "_extra_state" not in state:
        return state
    if which is None:
        which = "teacher" if state["_extra_state"].tolist()[1] else "student"
    prefix = f"{which}."
    return {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}


def load_detector(detector: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """
    Load a detector of the host's; a box predictor for other classes keeps its initial weights.

    Raises:
        InputError: as `load_matching`; every other weight must match.
    """
    own, predictor = detector.state_dict(), "roi_heads.box_predictor."
    heads = [name for name in own if name.startswith(f"{predictor}cls_score.")]
    if any(name in state and state[name].shape[:1] != own[name].shape[:1] for name in heads):
        logger.info("%s: box predictor is for other classes and starts anew", path)
        state = {name: v for name, v in state.items() if not name.startswith(predictor)}
        state |= {name: v for name, v in own.items() if name.startswith(predictor)}
    load_matching(detector, with_counters(detector, state), path)


def is_run_checkpoint(path: str | Path) -> bool:
    """Return whether a file holds student and teacher, rather than weights of one detector."""
    return Path(path).suffix == ".pth" and "_extra_state" in read_checkpoint(path).get("model", {})


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
