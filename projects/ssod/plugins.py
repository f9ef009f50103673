"""Filters and methods of the user's own, from a Python file that a config names."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from pathlib import Path
from types import ModuleType

from fvcore.common.config import CfgNode

from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY
from ssod.core.method import METHOD_REGISTRY
from ssod.errors import InputError

logger = logging.getLogger(__name__)

GIVEN = ("num_classes", "max_detections", "passes", "student", "unsup_box_losses")  # are no keys


def load_plugin(path: str, cfg: CfgNode) -> None:
    """
    Run a Python file that registers filters and methods, and add their keys to a config.

    A keyword argument of a filter becomes a key of `SSOD.FILTER`, one of a method a key of its
    group, in upper case and with the default as its value; the group gets `ENABLED` False. The
    file is run once in a process, and the config changed in place.

    Raises:
        InputError: if the file is missing or fails, or an argument has no default.
    """
    module = _import_file(Path(path))
    for _, cls in PSEUDO_LABEL_FILTER_REGISTRY:
        if cls.__module__ == module.__name__:
            _add_keys(cfg.SSOD.FILTER, cls, path)
    for _, cls in METHOD_REGISTRY:
        if cls.__module__ == module.__name__:
            group = cfg.SSOD.setdefault(cls.group, type(cfg)())
            group.ENABLED = False
            _add_keys(group, cls, path)


def _import_file(path: Path) -> ModuleType:
    name = f"ssod_plugin:{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise InputError(f"SSOD.PLUGIN {path}: not found; name a Python file")
    logger.info("SSOD.PLUGIN: running %s", path)
    spec = importlib.util.spec_from_loader(
        name, importlib.machinery.SourceFileLoader(name, str(path))
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of the user's code
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"SSOD.PLUGIN {path}: cannot be imported: {reason}") from error
    return module


def _add_keys(group: CfgNode, cls: type, path: str) -> None:
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in GIVEN or name.upper() in group:
            continue
        if parameter.default is parameter.empty:
            raise InputError(
                f"SSOD.PLUGIN {path}: the argument {name} of {cls.__name__} needs a default, which "
                f"its key has; only {', '.join(GIVEN)} need none"
            )
        group[name.upper()] = parameter.default
