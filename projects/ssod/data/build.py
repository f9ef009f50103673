"""From `SSOD.DATA.*` to the data sets of a run and its batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from ssod.data.datasets import (
    DetectionDataset,
    check_disjoint,
    read_coco,
    read_image_folder,
    read_index,
    read_voc,
)
from ssod.data.loader import build_two_stream_loader
from ssod.data.reading import OnProblem, stop
from ssod.data.splits import make_split
from ssod.data.views import check_view_keys
from ssod.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class RunData:
    """
    Data sets of one run.

    Attributes:
        labeled: images with boxes.
        unlabeled: images without, None if the run has none.
        val: images AP is measured on, None for no evaluation.
        hidden_truth: unlabeled images with the boxes that training never sees, to measure
            pseudo-labels against; None if unknown.
    """

    labeled: DetectionDataset
    unlabeled: DetectionDataset | None
    val: DetectionDataset | None
    hidden_truth: DetectionDataset | None


def classes_of(labeled: DetectionDataset | None) -> tuple[list[str], list[int]]:
    """Return names and category ids of the classes; none of a set that could not be read."""
    return ([], []) if labeled is None else (labeled.class_names, labeled.category_ids)


def read_unlabeled(
    cfg: CfgNode, labeled: DetectionDataset | None, on_problem: OnProblem = stop
) -> DetectionDataset | None:
    """
    Read the unlabeled files of `SSOD.DATA`, None if it names none.

    Raises:
        InputError: for two lists of them, and as the readers.
    """
    data, classes = cfg.SSOD.DATA, classes_of(labeled)
    _check_one_of(data, "UNLABELED_JSON", "UNLABELED_INDEX")
    if data.UNLABELED_JSON:
        return read_coco(
            data.UNLABELED_JSON,
            data.UNLABELED_IMAGES,
            require_annotations=False,
            on_problem=on_problem,
        )
    if data.UNLABELED_INDEX:
        return read_index(data.UNLABELED_INDEX, data.UNLABELED_IMAGES, *classes)
    if data.UNLABELED_IMAGES:
        return read_image_folder(data.UNLABELED_IMAGES, *classes, on_problem)
    return None


def read_labeled(cfg: CfgNode, on_problem: OnProblem = stop) -> DetectionDataset:
    """
    Read the labeled files of `SSOD.DATA`.

    Raises:
        InputError: if none or two are named, and as `read_coco` and `read_voc`.
    """
    data = cfg.SSOD.DATA
    _check_one_of(data, "LABELED_JSON", "LABELED_VOC")
    options = {"skip_invalid_boxes": data.SKIP_INVALID_BOXES, "on_problem": on_problem}
    if data.LABELED_VOC:
        return read_voc(data.LABELED_VOC, data.LABELED_IMAGES, **options)
    if not data.LABELED_JSON:
        raise InputError(
            "SSOD.DATA.LABELED_JSON is empty; name a COCO JSON of labeled images, or Pascal VOC "
            "files in SSOD.DATA.LABELED_VOC"
        )
    return read_coco(data.LABELED_JSON, data.LABELED_IMAGES, **options)


def read_val(
    cfg: CfgNode, labeled: DetectionDataset | None, on_problem: OnProblem = stop
) -> DetectionDataset | None:
    """
    Read the validation files of `SSOD.DATA`; boxes without area go.

    None if it names none, and without a labeled set for VOC files, which have its classes.
    """
    data = cfg.SSOD.DATA
    _check_one_of(data, "VAL_JSON", "VAL_VOC")
    options = {"skip_invalid_boxes": True, "on_problem": on_problem}
    if data.VAL_VOC:
        if labeled is None:
            return None
        return read_voc(data.VAL_VOC, data.VAL_IMAGES, like=labeled, **options)
    return read_coco(data.VAL_JSON, data.VAL_IMAGES, **options) if data.VAL_JSON else None


def read_hidden_truth(cfg: CfgNode, on_problem: OnProblem = stop) -> DetectionDataset | None:
    """Read `SSOD.DATA.UNLABELED_TRUTH_JSON`, None if it is ""; boxes without area go."""
    data = cfg.SSOD.DATA
    if not data.UNLABELED_TRUTH_JSON:
        return None
    options = {"skip_invalid_boxes": True, "on_problem": on_problem}
    return read_coco(data.UNLABELED_TRUTH_JSON, data.UNLABELED_IMAGES, **options)


def _check_one_of(data: CfgNode, *keys: str) -> None:
    if all(data[key] for key in keys):
        names = " and ".join(f"SSOD.DATA.{key}" for key in keys)
        raise InputError(f"{names} both name images; set one of them")


def set_names(cfg: CfgNode) -> tuple[str, str, str]:
    """Return what errors call the labeled set, the validation set and the hidden truth."""
    data = cfg.SSOD.DATA
    labeled, val = data.LABELED_JSON or data.LABELED_VOC, data.VAL_JSON or data.VAL_VOC
    return labeled, val, data.UNLABELED_TRUTH_JSON


def try_read(read: Callable[..., Any], *args: Any, on_problem: OnProblem, **kwargs: Any) -> Any:
    """Return what is read, None where nothing can be and `on_problem` does not raise."""
    try:
        return read(*args, on_problem=on_problem, **kwargs)
    except InputError as error:
        on_problem("annotations", error)
        return None


def read_sets(cfg: CfgNode, on_problem: OnProblem = stop) -> tuple[RunData, tuple[str, str, str]]:
    """
    Read the sets that a config names by their files, before any split.

    Returns:
        The sets, and what errors call three of them. A set that cannot be read is None, also the
        labeled one, if `on_problem` does not raise.

    Raises:
        InputError: for a missing key or file, and damaged data.
    """
    read = partial(try_read, on_problem=on_problem)
    labeled = read(read_labeled, cfg)
    unlabeled, val = read(read_unlabeled, cfg, labeled), read(read_val, cfg, labeled)
    return RunData(labeled, unlabeled, val, read(read_hidden_truth, cfg)), set_names(cfg)


def load_run_data(cfg: CfgNode) -> RunData:
    """
    Read, split and check the data sets that a config names by their files.

    Raises:
        InputError: as `read_sets` and `make_run_data`.
    """
    return make_run_data(cfg, *read_sets(cfg))


def make_run_data(cfg: CfgNode, sets: RunData, names: tuple[str, str, str]) -> RunData:
    """
    Split the labeled set if the config says so, and check that the sets fit together.

    Args:
        cfg: `SSOD.DATA.PERCENT` and `SPLIT_SEED` ask for a split.
        sets: as they were read; boxes of the unlabeled set are dropped.
        names: what to call the labeled set, the validation set and the hidden truth in errors.

    Raises:
        InputError: for a number of classes other than the model's, categories that differ, images
            in two of the sets, and unlabeled images that are missing or that a split would add to.
    """
    for error in find_conflicts(cfg, sets, names):
        raise error
    data = cfg.SSOD.DATA
    labeled, unlabeled, hidden_truth = sets.labeled, sets.unlabeled, sets.hidden_truth
    if data.PERCENT:
        labeled, unlabeled = split_labeled(cfg, labeled)
        hidden_truth = unlabeled
    if unlabeled is not None:
        unlabeled = unlabeled.without_boxes()  # wherever it is from: boxes must not leak
        check_disjoint(labeled, unlabeled)
    if sets.val is not None:
        check_disjoint(labeled, sets.val, "for validation")
    logger.info(
        "%d labeled images with %d boxes, %s unlabeled, %s for validation",
        len(labeled),
        int(labeled.class_counts.sum()),
        len(unlabeled) if unlabeled else "no",
        len(sets.val) if sets.val else "none",
    )
    return RunData(labeled, unlabeled, sets.val, hidden_truth)


def split_labeled(
    cfg: CfgNode, labeled: DetectionDataset
) -> tuple[DetectionDataset, DetectionDataset]:
    """Split by `SSOD.DATA.PERCENT`: images that keep their labels, and the others."""
    data = cfg.SSOD.DATA
    ids = set(make_split(labeled.image_ids, data.PERCENT, data.SPLIT_SEED))
    return labeled.select(ids), labeled.select(i for i in labeled.image_ids if i not in ids)


def find_conflicts(
    cfg: CfgNode, sets: RunData, names: tuple[str, str, str]
) -> Iterator[InputError]:
    """Yield what does not fit together: a config and its sets before any split, as above."""
    data, num_classes = cfg.SSOD.DATA, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    labeled, unlabeled = sets.labeled, sets.unlabeled
    if labeled.num_classes != num_classes:
        yield InputError(
            f"{names[0]}: has {labeled.num_classes} categories, but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; set it to {labeled.num_classes}"
        )
    for name, other in ((names[1], sets.val), (names[2], sets.hidden_truth)):
        if other and (other.category_ids, other.class_names) != (
            labeled.category_ids,
            labeled.class_names,
        ):
            yield InputError(
                f"{name}: its categories differ from those of {names[0]}; "
                "both need the same ids and names"
            )
    if data.PERCENT and unlabeled is not None:
        yield InputError(
            "SSOD.DATA.PERCENT splits the labeled set and cannot be combined with "
            "SSOD.DATA.UNLABELED_IMAGES or other unlabeled images; set one of them"
        )
    if cfg.SSOD.UNSUP_LOSS_WEIGHT > 0 and data.UNLABELED_PER_BATCH == 0:
        yield InputError(
            "SSOD.DATA.UNLABELED_PER_BATCH must be at least 1 while SSOD.UNSUP_LOSS_WEIGHT is not 0"
        )
    # Of the keys, as `ssod check-data` goes on without a set that it could not read.
    has_unlabeled = data.PERCENT or data.UNLABELED_JSON or data.UNLABELED_INDEX
    has_unlabeled = has_unlabeled or data.UNLABELED_IMAGES or unlabeled is not None
    if cfg.SSOD.UNSUP_LOSS_WEIGHT > 0 and not has_unlabeled:
        yield InputError(
            "no unlabeled images: set SSOD.DATA.UNLABELED_IMAGES or SSOD.DATA.PERCENT, or "
            "SSOD.UNSUP_LOSS_WEIGHT 0 for supervised training"
        )


def build_train_loader(
    cfg: CfgNode,
    data: RunData,
    start_iter: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """
    Build the loader of a run's batches from `start_iter` to the end; see `build_two_stream_loader`.

    Raises:
        InputError: as `check_view_keys`.
    """
    check_view_keys(cfg.INPUT)
    return build_two_stream_loader(
        data.labeled,
        data.unlabeled if cfg.SSOD.UNSUP_LOSS_WEIGHT > 0 else None,
        labeled_batch=cfg.SOLVER.IMS_PER_BATCH,
        unlabeled_batch=cfg.SSOD.DATA.UNLABELED_PER_BATCH,
        burn_in_iters=cfg.SSOD.BURN_IN_ITERS,
        seed=cfg.SEED,
        start_iter=start_iter,
        max_iter=cfg.SOLVER.MAX_ITER,
        min_sizes=cfg.INPUT.MIN_SIZE_TRAIN,
        size_range=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range",
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        flip=cfg.INPUT.RANDOM_FLIP == "horizontal",
        independent=cfg.SSOD.VIEWS.INDEPENDENT,
        warp=cfg.SSOD.VIEWS.WARP,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        rank=rank,
        world_size=world_size,
        pin_memory=pin_memory,
        labeled_strong=cfg.SSOD.LABELED_VIEWS != "weak",
        second_strong=cfg.SSOD.CONTRASTIVE.ENABLED and cfg.SSOD.CONTRASTIVE.VIEWS == "student",
    )
