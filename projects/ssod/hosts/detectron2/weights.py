"""
Initial weights of student and teacher: `MODEL.WEIGHTS`.

Detectron2's own loader runs whatever code a pickle holds, and only warns of weights that match
nothing. Here nothing but arrays is read, and what matches nothing is an error.
"""

from __future__ import annotations

import codecs
import logging
import pickle
import re
from collections import OrderedDict
from http.client import HTTPException
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ssod.errors import InputError
from ssod.hosts.checkpoint import (
    detector_state,
    load_detector,
    load_matching,
    read_checkpoint,
    with_counters,
)

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
# How files of `torch.save` begin: zip archives, and before PyTorch 1.6 its magic number.
_TORCH_BEGINNINGS = (b"PK", pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2))
# Functions that pickles of arrays call; asked of numpy, whose modules differ between versions.
_RECONSTRUCT = np.empty(1).__reduce__()[0]
_FROM_BUFFER = np.empty(1).__reduce_ex__(5)[0]
_SCALAR = np.float32(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _RECONSTRUCT
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _SCALAR
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _FROM_BUFFER

# In older checkpoints; the config gives them.
_FROM_CONFIG = re.compile(r"pixel_mean$|pixel_std$|.*anchor_generator\.cell_anchors")
# Of ImageNet: converted from torchvision or MoCo, Detectron2's ResNet, Caffe2 (renamed).
_IMAGENET_HEAD = re.compile(r"(stem\.)?fc\.|linear\.|fc1000\.")
# Caffe2's convolutions have biases, which the norms after them make superfluous.
_CONV_BIAS = re.compile(r"(.*\.)?(conv\d|shortcut)\.bias$")


def load_weights(student: nn.Module, path: str) -> None:
    """
    Fill the student.

    What a file is for is told by its content:

    - a checkpoint of a run: its teacher, or its student if the teacher had not started;
    - a detector of Detectron2, of `torch.save` or of the model zoo (pickle). A box predictor for
      another number of classes starts anew, with one line logged;
    - an ImageNet backbone (pickle) with names of Caffe2 or Detectron2, for the bottom-up part of
      the FPN. Its classification layer is left out.

    Args:
        student: has its initial weights.
        path: file, or URL that Detectron2's `PathManager` knows (`detectron2://`, `https://`).

    Raises:
        InputError: if the file cannot be read, holds anything but arrays, or does not match; then
            nothing is changed.
    """
    path = local_path(path)
    content = _read_content(path)
    weights = content.get("model", content.get("blobs", content))
    state = _to_tensors(weights, path)
    state = detector_state(state)
    if any(name.startswith("backbone.") for name in state):
        state = {name: value for name, value in state.items() if not _FROM_CONFIG.match(name)}
        load_detector(student, state, path)
    else:
        # Into the backbone alone: names are exact there, and no head can match by accident.
        _load_backbone(student.backbone.bottom_up, state, path)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers; calls nothing else."""

    def __init__(self, file: BinaryIO, path: str):
        # Python 2 wrote many of these files: its strings are read as Detectron2 reads them.
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"{self.path}: expected a pickle of arrays only, but it wants to run "
                f"{module}.{name}; it was not run. Use a file from Detectron2's model zoo, or "
                "save the weights as arrays or with torch.save"
            )
        return _ALLOWED[module, name]


def local_path(path: str) -> str:
    """
    Return the file that a path or a URL of Detectron2's `PathManager` means.

    Raises:
        InputError: if it cannot be fetched.
    """
    try:
        return PathManager.get_local_path(path)
    except (OSError, LookupError, RuntimeError, ValueError, HTTPException) as error:
        raise InputError(
            f"{path}: cannot be fetched ({error}); download it and set MODEL.WEIGHTS to the file"
        ) from error


def _read_content(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            beginning = file.read(max(map(len, _TORCH_BEGINNINGS)))
            if not beginning.startswith(_TORCH_BEGINNINGS):
                file.seek(0)
                return _read_pickle(file, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); set MODEL.WEIGHTS to a file of weights"
        ) from error
    return read_checkpoint(path)


def _read_pickle(file: BinaryIO, path: str) -> dict[str, Any]:
    try:
        content = _ArrayUnpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise InputError(
            f"{path}: neither a file of torch.save nor a pickle of arrays that can be read "
            f"({reason}); it may be truncated or of another program"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dictionary of weights, got {type(content).__name__}")
    return content


def _to_tensors(weights: Any, path: str) -> State:
    if not isinstance(weights, dict):
        raise InputError(f"{path}: expected a dictionary of weights, got {type(weights).__name__}")
    state = {}
    for name, value in weights.items():
        if str(name).endswith("_momentum"):  # Caffe2 keeps the optimizer's state beside the weights
            continue
        try:
            # Copied: arrays from a pickle may be read-only.
            state[name] = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}: expected weights by name, but {name!r} is {type(value).__name__}; "
                "it is a file of another program"
            ) from error
    if not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: expected weights by name; it is a file of another program")
    return state


def _load_backbone(backbone: nn.Module, state: State, path: str) -> None:
    own = backbone.state_dict()
    # Caffe2 has underscores where PyTorch has dots.
    is_caffe2 = not any("." in name for name in state)
    folded_norms = is_caffe2 and any("_bn_" in name for name in state)
    if is_caffe2:
        state, _ = convert_c2_detectron_names(state)
        unused = [name for name in state if name not in own and _CONV_BIAS.match(name)]
        state = {name: value for name, value in state.items() if name not in unused}
    state = {name: value for name, value in state.items() if not _IMAGENET_HEAD.match(name)}
    if not own.keys() & state.keys():
        raise InputError(
            f"{path}: expected a checkpoint of a run, a detector of Detectron2, or a backbone with "
            f"names of Caffe2 or Detectron2, got {len(state)} weights such as "
            f"{next(iter(state), 'none')!r}. A ResNet of torchvision needs Detectron2's "
            "tools/convert-torchvision-to-d2.py"
        )
    if folded_norms and not any(name.endswith("running_var") for name in state):
        state |= _identity_statistics(backbone, path)
    try:
        load_matching(backbone, with_counters(backbone, state), path)
    except InputError as error:
        raise InputError(f"{error} For a backbone these are the keys MODEL.RESNETS.*.") from error


def _identity_statistics(backbone: nn.Module, path: str) -> State:
    """Statistics for norms whose own are folded into scale and shift, as early Caffe2 files do."""
    frozen = {n: m for n, m in backbone.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    if not frozen:
        raise InputError(
            f"{path}: its batch norms are folded into scale and shift, which only frozen norms can "
            'take; set MODEL.RESNETS.NORM to "FrozenBN"'
        )
    return {
        f"{name}.{statistic}": getattr(norm, statistic)
        for name, norm in frozen.items()
        for statistic in ("running_mean", "running_var")
    }
