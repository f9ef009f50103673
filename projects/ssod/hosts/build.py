"""From `SSOD.*` to the arguments of `TeacherStudent`: the one place where keys reach the core."""

from __future__ import annotations

import inspect
from typing import Any

from fvcore.common.config import CfgNode

from ssod.core.distributed import get_world_size
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY, PseudoLabelFilter
from ssod.core.interfaces import RegionDetector
from ssod.core.method import METHOD_REGISTRY, Method
from ssod.errors import InputError


def teacher_student_arguments(cfg: CfgNode, student: RegionDetector) -> dict[str, Any]:
    """
    Return the arguments of `TeacherStudent`, all but the student.

    Raises:
        InputError: as `build_filter` and `build_methods`.
    """
    ssod = cfg.SSOD
    return {
        "pseudo_label_filter": build_filter(cfg, student.num_classes),
        "methods": build_methods(cfg, student),
        "burn_in_iters": ssod.BURN_IN_ITERS,
        "ema_decay": ssod.EMA_DECAY,
        "ema_gamma": ssod.EMA_GAMMA,
        "unsup_loss_weight": ssod.UNSUP_LOSS_WEIGHT,
        "unsup_box_losses": ssod.UNSUP_BOX_LOSSES,
        "empty_images": ssod.EMPTY_IMAGES,
        "labeled_views": ssod.LABELED_VIEWS,
    }


def build_filter(cfg: CfgNode, num_classes: int) -> PseudoLabelFilter:
    """
    Build the filter that `SSOD.FILTER.NAME` names, for K classes.

    Raises:
        InputError: if no such filter is registered, or it refuses a key.
    """
    keys, passes = cfg.SSOD.FILTER, cfg.SSOD.ACCUMULATE_STEPS
    if keys.NAME not in PSEUDO_LABEL_FILTER_REGISTRY:
        known = sorted(name for name, _ in PSEUDO_LABEL_FILTER_REGISTRY)
        raise InputError(f"SSOD.FILTER.NAME must be one of {known}, got {keys.NAME!r}")
    given: dict[str, Any] = {
        "num_classes": num_classes,
        "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "passes": passes,
        # Of an iteration, of which each pass has a part of the images.
        "ema_decay": keys.EMA_DECAY ** (1 / passes) if 0 < keys.EMA_DECAY < 1 else keys.EMA_DECAY,
    }
    cls = PSEUDO_LABEL_FILTER_REGISTRY.get(keys.NAME)
    if "undecided_thresh" in inspect.signature(cls).parameters:
        given["undecided_thresh"] = _undecided_thresh(cfg)
    return _make(cls, keys, given)


def build_methods(cfg: CfgNode, student: RegionDetector) -> dict[str, Method]:
    """
    Build the methods whose group of keys says `ENABLED`, by the name of the group.

    Raises:
        InputError: if one refuses a key, or cannot work with this detector.
    """
    passes = cfg.SSOD.ACCUMULATE_STEPS * get_world_size()
    given = {
        "student": student,
        "unsup_box_losses": cfg.SSOD.UNSUP_BOX_LOSSES,
        # A control uses none.
        "unlabeled_per_pass": (
            cfg.SSOD.DATA.UNLABELED_PER_BATCH // passes if cfg.SSOD.UNSUP_LOSS_WEIGHT else None
        ),
    }
    return {cls.group: _make(cls, cfg.SSOD[cls.group], given) for cls in _enabled(cfg)}


def _enabled(cfg: CfgNode) -> list[type[Method]]:
    # The file of a plugin may have been run for another config.
    groups = [(cls, cfg.SSOD.get(cls.group)) for _, cls in METHOD_REGISTRY]
    return [cls for cls, keys in groups if keys is not None and keys.ENABLED]


def _undecided_thresh(cfg: CfgNode) -> float | None:
    """`SSOD.FILTER.UNDECIDED_THRESH` if a method learns undecided boxes, else None."""
    if not any(cls.undecided for cls in _enabled(cfg)):
        return None
    low, high = cfg.SSOD.FILTER.UNDECIDED_THRESH, cfg.SSOD.FILTER.SCORE_THRESH
    if not 0 <= low <= high:
        raise InputError(
            f"SSOD.FILTER.UNDECIDED_THRESH must be in [0, SSOD.FILTER.SCORE_THRESH {high}], "
            f"got {low}"
        )
    return low


def _make(cls: type, keys: CfgNode, given: dict[str, Any]) -> Any:
    """Call a class with those of its keyword arguments that are given, or else keys."""
    available = {key.lower(): value for key, value in keys.items()} | given
    parameters = inspect.signature(cls).parameters
    try:
        return cls(**{name: available[name] for name in parameters if name in available})
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # of a plugin's class
        raise InputError(f"{cls.__name__} cannot be made of its keys: {error}") from error
