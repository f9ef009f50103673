"""Checkpoints of a run, written atomically, and weights to start from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError
from ssod.files import replacing
from ssod.hosts.checkpoint import load_matching, read_checkpoint, with_counters

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pth"


def save_checkpoint(
    path: str | Path,
    model: TeacherStudent,
    optimizer: torch.optim.Optimizer,
    config: str,
    categories: list[dict[str, Any]],
) -> None:
    """
    Write a run's state, replacing an older file only once the new one is complete.

    Args:
        path: file to write.
        model: student, teacher, filter and iteration.
        optimizer: its state and its name go with the model's.
        config: the resolved config as YAML, for people and for later loading.
        categories: of the labeled set, so that predictions have names.
    """
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizer_name": type(optimizer).__name__,
        "config": config,
        "categories": categories,
    }
    with replacing(Path(path)) as partial:
        torch.save(state, partial)


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
        load_matching(detector.backbone.body, with_counters(detector.backbone.body, body), path)
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
    load_matching(detector, with_counters(detector, state), path)
