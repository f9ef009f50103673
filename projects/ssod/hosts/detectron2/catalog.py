"""
The data sets of a run: from Detectron2's catalog, from the files of `SSOD.DATA.*`, or from both.

Importing it registers `coco_2017_unlabeled`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ssod.data import build
from ssod.data.build import RunData, make_run_data
from ssod.data.datasets import DetectionDataset, ImageRecord, read_coco
from ssod.data.images import read_image_size
from ssod.errors import InputError
from ssod.hosts.detectron2.evaluators import check_evaluable, reading_catalog, test_dataset_names

logger = logging.getLogger(__name__)

COCO_UNLABELED = "coco_2017_unlabeled"
_UNLABELED_FILES = tuple(f"UNLABELED_{end}" for end in ("JSON", "INDEX", "IMAGES", "TRUTH_JSON"))
_Set = tuple[str, list[dict[str, Any]]]  # a name, and images in Detectron2's standard format


def load_run_data(cfg: CfgNode) -> RunData:
    """
    Read, split and check the data sets of a config.

    Labeled images are `DATASETS.TRAIN`, `SSOD.DATA.LABELED_JSON` or `LABELED_VOC`; unlabeled ones
    `SSOD.DATA.UNLABELED` (with `DATASETS.TRAIN` only) or `SSOD.DATA.UNLABELED_IMAGES`; those for
    validation `DATASETS.TEST`, `SSOD.DATA.VAL_JSON` or `VAL_VOC`.

    `DATALOADER.FILTER_EMPTY_ANNOTATIONS` leaves images without boxes out of `DATASETS.TRAIN`
    before a split, as published results do (117,266 images of COCO train2017 remain). Files of
    `SSOD.DATA.*` are never filtered.

    Raises:
        InputError: for two sources of one set, and as `read_catalog`, `check_evaluable` and
            `ssod.data.build.load_run_data`.
    """
    _check_sources(cfg)
    is_in_catalog = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    data = make_run_data(cfg, *read_sets(cfg)) if is_in_catalog else build.load_run_data(cfg)
    for name in test_dataset_names(cfg):
        check_evaluable(name)  # here rather than after hours of training
    return data


def _check_sources(cfg: CfgNode) -> None:
    files, sets = cfg.SSOD.DATA, cfg.DATASETS
    for what, key, found, file_key in (
        *(("labeled", "DATASETS.TRAIN", sets.TRAIN, f"LABELED_{f}") for f in ("JSON", "VOC")),
        *(("validation", "DATASETS.TEST", sets.TEST, f"VAL_{f}") for f in ("JSON", "VOC")),
        *(("unlabeled", "SSOD.DATA.UNLABELED", files.UNLABELED, f) for f in _UNLABELED_FILES),
    ):
        if found and files[file_key]:
            raise InputError(
                f"{key} and SSOD.DATA.{file_key} both name {what} images; set one of them"
            )
    if not sets.TRAIN and not files.LABELED_JSON and not files.LABELED_VOC:
        raise InputError(
            "no labeled images: set DATASETS.TRAIN to names in DatasetCatalog, or "
            "SSOD.DATA.LABELED_JSON to a COCO JSON, or SSOD.DATA.LABELED_VOC to Pascal VOC files"
        )
    if files.UNLABELED and not sets.TRAIN:
        raise InputError(
            "SSOD.DATA.UNLABELED needs DATASETS.TRAIN; with SSOD.DATA.LABELED_JSON set "
            "SSOD.DATA.UNLABELED_IMAGES instead"
        )


def read_sets(cfg: CfgNode) -> tuple[RunData, tuple[str, str, str]]:
    """Return the sets before any split, and what errors call three of them; as `load_run_data`."""
    files, train, test = cfg.SSOD.DATA, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    skip, filter_empty = files.SKIP_INVALID_BOXES, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    truth = build.read_hidden_truth(cfg)
    if train:
        labeled = read_catalog(train, skip_invalid_boxes=skip, filter_empty=filter_empty)
    else:
        labeled = build.read_labeled(cfg)
    if files.UNLABELED:
        unlabeled, truth = _read_unlabeled(files.UNLABELED, labeled)
    else:
        unlabeled = build.read_unlabeled(cfg, labeled)
    val = read_catalog(test, skip_invalid_boxes=True) if test else build.read_val(cfg, labeled)
    for other in (truth, val):
        # Detectron2 maps the category ids of each set to classes; only the classes have to agree.
        if other is not None and other.class_names == labeled.class_names:
            other.category_ids = labeled.category_ids
    catalog = (train, test, files.UNLABELED)
    names = tuple(", ".join(c) or f for c, f in zip(catalog, build.set_names(cfg), strict=True))
    return RunData(labeled, unlabeled, val, truth), names


def read_catalog(
    names: Sequence[str], *, skip_invalid_boxes: bool = False, filter_empty: bool = False
) -> DetectionDataset:
    """
    Read sets of `DatasetCatalog` as one. Boxes are clipped to their image, crowds left out.

    Args:
        names: of sets with the same `thing_classes`. If there are several, "name/id" is the id of
            an image.
        skip_invalid_boxes: leave boxes without area out, with one warning, instead of failing.
        filter_empty: leave out images that have no annotation or only crowds, as Detectron2 does.

    Raises:
        InputError: for a name that is not registered, missing files, classes that differ, and
            what is not in Detectron2's standard format.
    """
    sets = [_read_set(name) for name in names]
    classes = [_class_names(name) for name in names]
    for name, found in zip(names, classes, strict=True):
        if not found or found != classes[0]:
            problem = f"differ from those of {names[0]}" if found else "are missing"
            raise InputError(
                f"{name}: its thing_classes {problem}; set them in MetadataCatalog, the same for "
                "all sets that are used together"
            )
    if filter_empty:
        sets = [(name, [e for e in entries if _has_objects(e)]) for name, entries in sets]
        logger.info("%s: %d images with boxes", ", ".join(names), sum(len(e) for _, e in sets))
    if not any(entries for _, entries in sets):
        raise InputError(f"{', '.join(names)}: expected images with boxes, found none")
    classes_of = MetadataCatalog.get(names[0]).get("thing_dataset_id_to_contiguous_id", {})
    category_ids = sorted(classes_of, key=classes_of.get)
    if len(category_ids) != len(classes[0]):
        category_ids = list(range(len(classes[0])))
    return _make_dataset(sets, classes[0], category_ids, skip_invalid_boxes)


def _read_unlabeled(
    names: Sequence[str], labeled: DetectionDataset
) -> tuple[DetectionDataset, DetectionDataset | None]:
    """Return the images, and again as hidden truth if all sets have boxes of these classes."""
    sets = [_read_set(name) for name in names]
    has_truth = all(
        _class_names(name) == labeled.class_names and any(_has_objects(e) for e in entries)
        for name, entries in sets
    )
    if not has_truth:
        sets = [(name, [e | {"annotations": ()} for e in entries]) for name, entries in sets]
    found = _make_dataset(sets, labeled.class_names, labeled.category_ids, True)
    return found, found if has_truth else None


def _class_names(name: str) -> list[str]:
    # Known only once the set has been read: Detectron2's COCO reader finds them in the file.
    return list(MetadataCatalog.get(name).get("thing_classes", ()))


def _is_object(annotation: dict[str, Any]) -> bool:
    return annotation.get("iscrowd", 0) == 0


def _has_objects(entry: dict[str, Any]) -> bool:
    return any(_is_object(annotation) for annotation in entry.get("annotations", ()))


def _read_set(name: str) -> _Set:
    with reading_catalog(name):
        entries = DatasetCatalog.get(name)
        if not all(entry.get("file_name") for entry in entries):
            raise InputError(f"{name}: an entry has no file_name; each needs an image file")
        # A missing folder is a wrong path; a missing file counts as one that cannot be decoded.
        for folder in {os.path.dirname(os.path.abspath(entry["file_name"])) for entry in entries}:
            os.stat(folder)
    return name, entries


def _make_dataset(
    sets: Sequence[_Set],
    class_names: Sequence[str],
    category_ids: Sequence[int],
    skip_invalid: bool,
) -> DetectionDataset:
    records: dict[int | str, ImageRecord] = {}
    num_skipped = 0
    for name, entries in sets:
        for entry in entries:
            image_id = entry["image_id" if "image_id" in entry else "file_name"]
            if isinstance(image_id, np.generic):
                image_id = image_id.item()
            if type(image_id) not in (int, str):
                raise InputError(f"{name}: image_id must be an integer or text, got {image_id!r}")
            if len(sets) > 1:
                image_id = f"{name}/{image_id}"
            if image_id in records:
                raise InputError(f"{name}: two images have the id {image_id!r}; make ids unique")
            record, count = _make_record(image_id, entry, len(class_names), skip_invalid)
            records[image_id] = record
            num_skipped += count
    if num_skipped:
        names = ", ".join(name for name, _ in sets)
        logger.warning("%s: left out %d boxes without area", names, num_skipped)
    return DetectionDataset(records.values(), class_names, category_ids)


def _make_record(
    image_id: int | str, entry: dict[str, Any], num_classes: int, skip_invalid: bool
) -> tuple[ImageRecord, int]:
    """Return the record of an image, and how many boxes without area were left out."""
    file_name = os.path.abspath(entry["file_name"])
    height, width = int(entry.get("height") or 0), int(entry.get("width") or 0)
    if not height or not width:
        height, width = read_image_size(file_name)
    found_boxes, found_classes = [], []
    for index, annotation in enumerate(entry.get("annotations", ())):
        if _is_object(annotation):
            where = f"{file_name}: annotations[{index}]"
            found_boxes.append(_read_box(where, annotation, height, width))
            found_classes.append(_read_class(where, annotation, num_classes))
    boxes = np.array(found_boxes, np.float32).reshape(-1, 4)
    classes = np.array(found_classes, np.int64)
    valid = (boxes[:, 2:] > boxes[:, :2]).all(1)
    num_invalid = int((~valid).sum())
    if num_invalid and not skip_invalid:
        raise InputError(
            f"{file_name}: {num_invalid} boxes have no area inside the image of width {width} and "
            f"height {height}, clipped the first is XYXY {boxes[~valid][0].tolist()}: correct it, "
            "or set SSOD.DATA.SKIP_INVALID_BOXES True to leave such boxes out"
        )
    record = ImageRecord(image_id, file_name, height, width, boxes[valid], classes[valid])
    return record, num_invalid


def _read_box(
    where: str, annotation: dict[str, Any], height: int, width: int
) -> tuple[float, float, float, float]:
    """Return the XYXY box clipped to the image."""
    bbox, mode = annotation.get("bbox", ()), annotation.get("bbox_mode")
    try:
        x0, y0, x1, y1 = (float(value) for value in bbox)
        is_known = mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    except (TypeError, ValueError):
        is_known = False
    if not is_known or not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise InputError(
            f"{where}: expected 4 finite numbers as bbox, and bbox_mode XYXY_ABS or XYWH_ABS, got "
            f"{bbox!r} and {mode!r}"
        )
    if mode == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def _read_class(where: str, annotation: dict[str, Any], num_classes: int) -> int:
    found = annotation.get("category_id")
    if not isinstance(found, (int, np.integer)) or not 0 <= found < num_classes:
        raise InputError(
            f"{where}: category_id must be an index into thing_classes in [0, {num_classes}), got "
            f"{found!r}"
        )
    return int(found)


def _load_unlabeled(json_file: str, images: str) -> list[dict[str, Any]]:
    os.stat(json_file)  # raises what `reading_catalog` has an explanation for
    # Unlike Detectron2's reader this one needs neither annotations nor categories.
    dataset = read_coco(json_file, images, require_annotations=False)
    return [
        {"file_name": r.file_name, "height": r.height, "width": r.width, "image_id": r.image_id}
        for r in (dataset[i] for i in range(len(dataset)))
    ]


def _register_coco_unlabeled() -> None:
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "coco")
    json_file = os.path.join(root, "annotations", "image_info_unlabeled2017.json")
    images = os.path.join(root, "unlabeled2017")
    if COCO_UNLABELED not in DatasetCatalog.list():
        DatasetCatalog.register(COCO_UNLABELED, partial(_load_unlabeled, json_file, images))


_register_coco_unlabeled()
