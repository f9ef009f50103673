"""
The data sets of a run: from Detectron2's catalog, from the files of `SSOD.DATA.*`, or from both.

Importing it registers `coco_2017_unlabeled`.
"""

from __future__ import annotations

import logging
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
from ssod.data.coco_file import is_crowd
from ssod.data.datasets import DetectionDataset, ImageRecord, read_coco
from ssod.data.images import read_image_size
from ssod.data.reading import XYWH, XYXY, OnProblem, read_box, skipping_boxes, stop
from ssod.errors import InputError
from ssod.hosts.detectron2.evaluators import (
    check_evaluable,
    reading_catalog,
    standard_format,
    test_dataset_names,
)

logger = logging.getLogger(__name__)

COCO_UNLABELED = "coco_2017_unlabeled"
_UNLABELED_FILES = tuple(f"UNLABELED_{end}" for end in ("JSON", "INDEX", "IMAGES", "TRUTH_JSON"))
_ENTRIES = "image entries"
_FORMS = {BoxMode.XYXY_ABS: XYXY, BoxMode.XYWH_ABS: XYWH}
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
    data = make_run_data(cfg, *read_sets(cfg))
    for name in test_dataset_names(cfg, data.val):
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


def read_sets(cfg: CfgNode, on_problem: OnProblem = stop) -> tuple[RunData, tuple[str, str, str]]:
    """Read the sets before any split, and name three of them, as `ssod.data.build.read_sets`."""
    files, train, test = cfg.SSOD.DATA, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    if not train and not test:
        return build.read_sets(cfg, on_problem)
    skip, filter_empty = files.SKIP_INVALID_BOXES, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    read = partial(build.try_read, on_problem=on_problem)
    truth = read(build.read_hidden_truth, cfg)
    if train:
        labeled = read(read_catalog, train, skip_invalid_boxes=skip, filter_empty=filter_empty)
    else:
        labeled = read(build.read_labeled, cfg)
    if files.UNLABELED:
        unlabeled, truth = read(_read_unlabeled, files.UNLABELED, labeled) or (None, None)
    else:
        unlabeled = read(build.read_unlabeled, cfg, labeled)
    if test:
        val = read(read_catalog, test, skip_invalid_boxes=True)
    else:
        val = read(build.read_val, cfg, labeled)
    for other in (truth, val):
        # Detectron2 maps the category ids of each set to classes; only the classes have to agree.
        if other and labeled and other.class_names == labeled.class_names:
            other.category_ids = labeled.category_ids
    catalog = (train, test, files.UNLABELED)
    names = tuple(", ".join(c) or f for c, f in zip(catalog, build.set_names(cfg), strict=True))
    return RunData(labeled, unlabeled, val, truth), names


def read_catalog(
    names: Sequence[str],
    *,
    skip_invalid_boxes: bool = False,
    filter_empty: bool = False,
    on_problem: OnProblem = stop,
) -> DetectionDataset:
    """
    Read sets of `DatasetCatalog` as one. Boxes are clipped to their image, crowds left out.

    Args:
        names: of sets with the same `thing_classes`. If there are several, "name/id" is the id of
            an image.
        skip_invalid_boxes: leave boxes without area out, with one warning, instead of failing.
        filter_empty: leave out images that have no annotation or only crowds, as Detectron2 does.
        on_problem: what to do about an entry that cannot be used; it is left out afterwards.

    Raises:
        InputError: for a name that is not registered, missing files, classes that differ, and
            what is not in Detectron2's standard format. With another `on_problem` only if nothing
            can be read.
    """
    sets = [_read_set(name, on_problem) for name in names]
    classes = [_class_names(name) for name in names]
    for name, found in zip(names, classes, strict=True):
        if not found or found != classes[0]:
            problem = f"differ from those of {names[0]}" if found else "are missing"
            message = f"{name}: its thing_classes {problem}; set them in MetadataCatalog"
            raise InputError(f"{message}, the same for all sets that are used together")
    if filter_empty:
        sets = [(name, [e for e in entries if _objects(e)]) for name, entries in sets]
        logger.info("%s: %d images with boxes", ", ".join(names), sum(len(e) for _, e in sets))
    if not any(entries for _, entries in sets):
        raise InputError(f"{', '.join(names)}: expected images with boxes, found none")
    classes_of = MetadataCatalog.get(names[0]).get("thing_dataset_id_to_contiguous_id", {})
    category_ids = sorted(classes_of, key=classes_of.get)
    if len(category_ids) != len(classes[0]):
        category_ids = list(range(len(classes[0])))
    return _make_dataset(sets, classes[0], category_ids, skip_invalid_boxes, on_problem)


def _read_unlabeled(
    names: Sequence[str], labeled: DetectionDataset | None, on_problem: OnProblem
) -> tuple[DetectionDataset, DetectionDataset | None]:
    """Return the images, and again as hidden truth if all sets have boxes of these classes."""
    sets = [_read_set(name, on_problem) for name in names]
    classes = build.classes_of(labeled)
    has_truth = all(
        _class_names(name) == classes[0] and any(_objects(e) for e in entries)
        for name, entries in sets
    )
    if not has_truth:
        sets = [(name, [e | {"annotations": ()} for e in entries]) for name, entries in sets]
    found = _make_dataset(sets, *classes, True, on_problem)
    return found, found if has_truth else None


def _class_names(name: str) -> list[str]:
    # Known only once the set has been read: Detectron2's COCO reader finds them in the file.
    return list(MetadataCatalog.get(name).get("thing_classes", ()))


def _objects(entry: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the annotations of an image but crowds, by their place."""
    found = enumerate(entry.get("annotations", ()))
    return {index: annotation for index, annotation in found if not is_crowd(annotation)}


def _read_set(name: str, on_problem: OnProblem) -> _Set:
    entries = []
    with reading_catalog(name):
        for index, entry in enumerate(DatasetCatalog.get(name)):
            if entry.get("file_name"):
                entries.append(entry)
                continue
            message = f"{name}: entry {index} has no file_name; each needs an image file"
            on_problem(_ENTRIES, InputError(message))
        # A missing folder is a wrong path; a missing file counts as one that cannot be decoded.
        for folder in {os.path.dirname(os.path.abspath(entry["file_name"])) for entry in entries}:
            os.stat(folder)
    return name, entries


def _make_dataset(
    sets: Sequence[_Set],
    class_names: Sequence[str],
    category_ids: Sequence[int],
    skip_invalid: bool,
    on_problem: OnProblem,
) -> DetectionDataset:
    records: dict[int | str, ImageRecord] = {}
    names = ", ".join(name for name, _ in sets)
    with skipping_boxes(names, skip_invalid, on_problem) as report:
        for name, entry in ((name, entry) for name, entries in sets for entry in entries):
            try:
                image_id = _read_id(name, entry, len(sets) > 1)
                if image_id in records:
                    raise InputError(
                        f"{name}: two images have the id {image_id!r}; make ids unique"
                    )
                records[image_id] = _make_record(image_id, entry, len(class_names), report)
            except InputError as error:
                on_problem(_ENTRIES, error)
    return DetectionDataset(records.values(), class_names, category_ids)


def _read_id(name: str, entry: dict[str, Any], is_one_of_several: bool) -> int | str:
    image_id = entry["image_id" if "image_id" in entry else "file_name"]
    if isinstance(image_id, np.generic):
        image_id = image_id.item()
    if type(image_id) not in (int, str):
        raise InputError(f"{name}: image_id must be an integer or text, got {image_id!r}")
    return f"{name}/{image_id}" if is_one_of_several else image_id


def _make_record(
    image_id: int | str, entry: dict[str, Any], num_classes: int, on_problem: OnProblem
) -> ImageRecord:
    file_name = os.path.abspath(entry["file_name"])
    height, width = int(entry.get("height") or 0), int(entry.get("width") or 0)
    if not height or not width:
        height, width = read_image_size(file_name)
    boxes, classes = [], []
    for index, annotation in _objects(entry).items():
        where = f"{file_name}: annotations[{index}]"
        try:
            form, label = _read_form_and_class(where, annotation, num_classes)
        except InputError as error:
            on_problem("annotations", error)
            continue
        box = read_box(where, annotation.get("bbox"), form, height, width, on_problem)
        if box is not None:
            boxes.append(box)
            classes.append(label)
    return ImageRecord.from_rows(image_id, file_name, (height, width), boxes, classes)


def _read_form_and_class(
    where: str, annotation: dict[str, Any], num_classes: int
) -> tuple[str, int]:
    mode, label = annotation.get("bbox_mode"), annotation.get("category_id")
    if mode not in tuple(_FORMS):  # which need not be hashable
        raise InputError(f"{where}: bbox_mode must be XYXY_ABS or XYWH_ABS, got {mode!r}")
    if not isinstance(label, (int, np.integer)) or not 0 <= label < num_classes:
        wanted = f"an index into thing_classes in [0, {num_classes})"
        raise InputError(f"{where}: category_id must be {wanted}, got {label!r}")
    return _FORMS[mode], int(label)


def _load_unlabeled(json_file: str, images: str) -> list[dict[str, Any]]:
    os.stat(json_file)  # raises what `reading_catalog` has an explanation for
    # Unlike Detectron2's reader this one needs neither annotations nor categories.
    return standard_format(read_coco(json_file, images, require_annotations=False))


def _register_coco_unlabeled() -> None:
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "coco")
    json_file = os.path.join(root, "annotations", "image_info_unlabeled2017.json")
    images = os.path.join(root, "unlabeled2017")
    if COCO_UNLABELED not in DatasetCatalog.list():
        DatasetCatalog.register(COCO_UNLABELED, partial(_load_unlabeled, json_file, images))


_register_coco_unlabeled()
