"""Weights to start from: `MODEL.WEIGHTS`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ssod.errors import InputError
from ssod.hosts.checkpoint import (
    detector_state,
    load_detector,
    load_matching,
    read_checkpoint,
    with_counters,
)


def load_weights(detector: nn.Module, path: str | Path) -> None:
    """
    Load weights for `MODEL.WEIGHTS`.

    Args:
        detector: model to fill.
        path: a checkpoint of a run, of which the teacher is taken, or the student if the teacher
            had not started; a state dict of torchvision's FasterRCNN, with a box predictor for any
            classes; or one of a torchvision ResNet, which fills the backbone's body.

    Raises:
        InputError: as `read_checkpoint` and `load_matching`.
    """
    state = read_checkpoint(path)
    state = state.get("model", state)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a state dict of tensors")
    state = detector_state(state)
    if "conv1.weight" in state:
        body = {name: v for name, v in state.items() if not name.startswith("fc.")}
        load_matching(detector.backbone.body, with_counters(detector.backbone.body, body), path)
    else:
        load_detector(detector, state, path)
