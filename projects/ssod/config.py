"""
Configuration: reading a YAML file into a host's config. The `SSOD.*` keys are in `ssod.keys`.

Everything else in a config has Detectron2's key names. Unknown keys are errors.
"""

from __future__ import annotations

import ast
import difflib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from ssod.core.method import METHOD_REGISTRY
from ssod.errors import InputError
from ssod.plugins import load_plugin
from ssod.removed import REMOVED, RENAMED

logger = logging.getLogger(__name__)

_NOT_EMPTY = ("INPUT.MIN_SIZE_TRAIN", "MODEL.RPN.IOU_THRESHOLDS", "MODEL.ROI_HEADS.IOU_THRESHOLDS")
_RANGES = {  # of keys that nothing else checks before training
    "SEED": (0, 2**63),
    "SSOD.FOCAL_GAMMA": (0, 10),
    "SSOD.RPN_IGNORE_WEIGHT": (0, 1),
    "SSOD.CANONICAL_BOX_SIZE": (1, 2**31),
    "SSOD.DATA.MAX_FAILED_SHARE": (0, 1),
    "SSOD.LOG_PERIOD": (1, 2**31),
    "SSOD.ACCUMULATE_STEPS": (1, 2**31),
    "SSOD.MAX_SKIPPED_STEPS": (1, 2**31),
    "SSOD.CHECKPOINTS_TO_KEEP": (1, 2**31),
    "SOLVER.MAX_ITER": (1, 2**63),
    "SOLVER.BASE_LR": (0, 1e3),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (0, 2**63),
    "INPUT.MAX_SIZE_TRAIN": (1, 2**31),
    "INPUT.MIN_SIZE_TEST": (1, 2**31),
    "INPUT.MAX_SIZE_TEST": (1, 2**31),
    "MODEL.ROI_HEADS.NUM_CLASSES": (1, 2**31),
    "MODEL.FPN.OUT_CHANNELS": (1, 2**31),
    "DATALOADER.NUM_WORKERS": (0, 1024),
}


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _coerce(default: Any, value: Any) -> Any:
    """Return the value in the type of the default; raise an error of any kind if it has another."""
    if isinstance(value, str) and not isinstance(default, str):
        # Of the command line, or what YAML 1.1 leaves as text: 1e-3, and tuples as Detectron2's
        # configs write them.
        loaded = yaml.safe_load(value)
        value = ast.literal_eval(value) if isinstance(loaded, str) else loaded
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        # Nothing tells of what type the items of an empty default are.
        return type(default)(_coerce(default[0], item) if default else item for item in value)
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    raise TypeError


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    given, key = key, RENAMED.get(key, key)
    if key in REMOVED:
        stays, instead = REMOVED[key]
        try:  # configs that runs have written hold every key
            if _coerce(stays, value) == stays:
                return
        except (TypeError, ValueError, SyntaxError, yaml.YAMLError):
            pass
        raise InputError(f"{source}: {key} was removed, and with it {value!r}: {instead}")
    known = dict(_leaves(cfg))
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see ssod.keys for those that exist"
        raise InputError(f"{source}: unknown key {key}; {hint}")
    try:
        value = _coerce(known[key], value)
    except (TypeError, ValueError, SyntaxError, yaml.YAMLError) as error:
        raise InputError(
            f"{source}: {given} needs a value of type {type(known[key]).__name__} such as "
            f"{known[key]!r}, got {value!r}"
        ) from error
    if key in _RANGES and not _RANGES[key][0] <= value <= _RANGES[key][1]:
        low, high = _RANGES[key]
        raise InputError(f"{source}: {key} must be in [{low}, {high}], got {value}")
    if key in _NOT_EMPTY and not value:
        raise InputError(f"{source}: {key} must not be empty")
    *groups, name = key.split(".")
    functools.reduce(getattr, groups, cfg)[name] = value


def _load_yaml(path: str) -> dict:
    if not Path(path).is_file():
        raise InputError(f"{path}: config file not found; paths are relative to the current folder")
    try:
        loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
    # fvcore lets TypeError out for an empty file and RecursionError for a `_BASE_` of itself.
    except (yaml.YAMLError, OSError, ValueError, AssertionError, TypeError, RecursionError) as bad:
        raise InputError(
            f"{path}: cannot be read as a YAML mapping of keys: {' '.join(str(bad).split())}"
        ) from bad
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a mapping of keys, got {type(loaded).__name__}")
    return loaded


def merge_config(
    cfg: CfgNode, path: str, overrides: Sequence[str] = (), run_plugin: bool = True
) -> CfgNode:
    """
    Merge a YAML file (with `_BASE_`) and `KEY VALUE ...` overrides into a host's defaults.

    Not `CfgNode.merge_from_file`, also for Detectron2's: that runs code which a YAML file holds,
    refuses 1 for 1.0, and says of a wrong key neither where it stands nor which one is near.

    Args:
        cfg: the host's defaults with `add_ssod_config` applied; changed in place and returned.
        path: YAML file; "" for none.
        overrides: alternating keys and values, as on a command line.
        run_plugin: run the file that `SSOD.PLUGIN` names. If not, and one is named, filter and
            methods are those of the defaults: for configs that the user has not named.

    Raises:
        InputError: for a missing or malformed file, an unknown key, or a value of another type
            or out of range, and as `load_plugin`.
    """
    if len(overrides) % 2:
        raise InputError(f"overrides must be KEY VALUE pairs, got {' '.join(overrides)!r}")
    leaves = dict(_leaves(_load_yaml(path) if path else {}))
    for old, new in RENAMED.items():
        if {old, new} <= leaves.keys():
            raise InputError(f"{path}: {old} is {new} now, and both are set: leave the former out")
    pairs = dict(zip(overrides[::2], overrides[1::2], strict=True))
    plugin = pairs.get("SSOD.PLUGIN", leaves.get("SSOD.PLUGIN", ""))
    if plugin and run_plugin:
        load_plugin(str(plugin), cfg)
    elif plugin:
        logger.info("%s: the file of SSOD.PLUGIN, %s, is not run", path, plugin)
        leaves = {k: v for k, v in leaves.items() if not _is_of_plugin(cfg, k)}
    for key, value in leaves.items():
        _set(cfg, key, value, path)
    for key, text in pairs.items():
        _set(cfg, key, text, "command line")
    return cfg


def _is_of_plugin(cfg: CfgNode, key: str) -> bool:
    """Whether a key may be of, or need, the file that `SSOD.PLUGIN` names."""
    group, _, rest = key.removeprefix("SSOD.").partition(".")
    known = cfg.SSOD.keys() - {"FILTER", *(cls.group for _, cls in METHOD_REGISTRY)}
    is_of_group = bool(rest) and key.startswith("SSOD.") and group not in known
    return key == "SSOD.PLUGIN" or is_of_group


def read_host(path: str, overrides: Sequence[str] = ()) -> str:
    """Return which host a config is for: `SSOD.HOST` of the overrides, the file or the default."""
    pairs = dict(zip(overrides[::2], overrides[1::2], strict=False))
    leaves = dict(_leaves(_load_yaml(path))) if path else {}
    host = pairs.get("SSOD.HOST", leaves.get("SSOD.HOST", "torchvision"))
    if host not in ("torchvision", "detectron2"):
        raise InputError(f'SSOD.HOST must be "torchvision" or "detectron2", got {host!r}')
    return host
