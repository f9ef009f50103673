"""Filters and methods of the user's own, from a Python file that a config names."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from pathlib import Path
from types import ModuleType

from fvcore.common.config import CfgNode

from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY, PseudoLabelFilter
from ssod.core.method import METHOD_REGISTRY, Method
from ssod.errors import InputError

logger = logging.getLogger(__name__)

GIVEN = (  # are no keys
    *("num_classes", "max_detections", "passes"),
    *("student", "unsup_box_losses", "unlabeled_per_pass"),
)


def load_plugin(path: str, cfg: CfgNode) -> None:
    """
    Run a Python file that registers filters and methods, and add their keys to a config.

    A keyword argument of a filter becomes a key of `SSOD.FILTER`, one of a method a key of its
    group, in upper case and with the default as its value; the group gets `ENABLED` False. The
    file is run once in a process, and the config changed in place.

    Raises:
        InputError: if the file is missing or fails, or what it registers does not fit.
    """
    module = _import_file(Path(path))
    bases = {PSEUDO_LABEL_FILTER_REGISTRY: PseudoLabelFilter, METHOD_REGISTRY: Method}
    for registry, base in bases.items():
        for name, cls in registry:
            if getattr(cls, "__module__", None) == module.__name__:
                if not (isinstance(cls, type) and issubclass(cls, base)):
                    raise InputError(f"SSOD.PLUGIN {path}: {name} must be a {base.__name__}")
                own = cfg.SSOD.FILTER if base is PseudoLabelFilter else _new_group(cfg, cls, path)
                _add_keys(own, cls, path)


def _new_group(cfg: CfgNode, cls: type, path: str) -> CfgNode:
    name = getattr(cls, "group", None)
    if not (isinstance(name, str) and name.isidentifier() and name.isupper()) or name in cfg.SSOD:
        raise InputError(
            f"SSOD.PLUGIN {path}: group of {cls.__name__} must be a new name in upper case for its "
            f"keys, got {name!r}"
        )
    group = cfg.SSOD[name] = type(cfg)()
    group.ENABLED = False
    return group


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
    except (Exception, SystemExit) as error:  # of the user's code
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"SSOD.PLUGIN {path}: cannot be imported: {reason}") from error
    return module


def _add_keys(group: CfgNode, cls: type, path: str) -> None:
    for name, parameter in inspect.signature(cls).parameters.items():
        is_open = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_open or name in (*GIVEN, "undecided_thresh"):
            continue
        key, default = name.upper(), parameter.default
        if type(default) not in (bool, int, float, str, tuple, list):
            raise InputError(
                f"SSOD.PLUGIN {path}: the argument {name} of {cls.__name__} needs a default, a "
                "number, text or tuple of them, which its key has; only "
                f"{', '.join(GIVEN)} need none"
            )
        if group.setdefault(key, default) != default:
            raise InputError(
                f"SSOD.PLUGIN {path}: the argument {name} of {cls.__name__} has the default "
                f"{default!r}, but the key {key} exists with {group[key]!r}; rename it"
            )
