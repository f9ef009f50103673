"""
Reader of COCO detection annotations.

Whatever is wrong with a file ends as an `InputError` that names the file and the entry.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data.records import DetectionDataset, ImageRecord
from ssod.errors import InputError

logger = logging.getLogger(__name__)

_MAX_SIDE = 1_000_000  # pixels; larger numbers are mistakes


def read_coco(
    json_path: str | Path,
    image_root: str | Path,
    *,
    skip_invalid_boxes: bool = False,
    require_annotations: bool = True,
) -> DetectionDataset:
    """
    Read a COCO annotation file.

    Category ids may have gaps: classes 0 to K - 1 are the ids in ascending order. Boxes are
    clipped to their image; crowd regions (`iscrowd` 1) are left out.

    Args:
        json_path: the annotation file.
        image_root: folder that the `file_name` of the images is relative to.
        skip_invalid_boxes: leave boxes without area out, with one warning, instead of failing.
        require_annotations: False for unlabeled sets. `annotations` and `categories` may be absent
            then, and annotations that are present are dropped unread, so that they cannot leak.

    Raises:
        InputError: if the file is missing or not valid COCO, or an image file is missing.
    """
    content = _load(json_path)
    image_entries = _entries(json_path, content, "images", required=True)
    category_entries = _entries(json_path, content, "categories", required=require_annotations)
    images = _read_images(json_path, image_entries, os.path.abspath(image_root))
    names = _read_categories(json_path, category_entries)
    boxes: dict[int | str, list[np.ndarray]] = defaultdict(list)
    classes: dict[int | str, list[int]] = defaultdict(list)
    if require_annotations:
        num_skipped = 0
        class_of = {category_id: k for k, category_id in enumerate(names)}
        for index, entry in enumerate(_entries(json_path, content, "annotations", required=True)):
            where = _where(json_path, "annotations", index, entry)
            image_id, category_id = _read_references(where, entry, images, class_of)
            if entry.get("iscrowd", 0) == 1:
                continue
            box = _read_box(where, entry.get("bbox"), *images[image_id][1:], skip_invalid_boxes)
            if box is None:
                num_skipped += 1
            else:
                boxes[image_id].append(box)
                classes[image_id].append(class_of[category_id])
        if num_skipped:
            logger.warning("%s: left out %d boxes without area", json_path, num_skipped)

    records = (
        ImageRecord(
            image_id,
            *image,
            np.array(boxes.get(image_id, ()), np.float32).reshape(-1, 4),
            np.array(classes.get(image_id, ()), np.int64),
        )
        for image_id, image in images.items()
    )
    return DetectionDataset(records, list(names.values()), list(names))


def _load(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: annotation file not found") from error
    except OSError as error:
        raise InputError(f"{path}: annotation file cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file, but it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected a COCO file, which is an object with 'images', 'annotations' and "
            f"'categories', but its top level is a {type(content).__name__}"
        )
    return content


def _entries(
    path: str | Path, content: dict[str, Any], key: str, required: bool
) -> list[dict[str, Any]]:
    if required and key not in content:
        raise InputError(f"{path}: expected a COCO file, but the key {key!r} is missing")
    entries = content.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: expected a COCO file, but {key!r} is not a list of objects")
    if required and not entries and key != "annotations":
        raise InputError(f"{path}: {key!r} is empty, at least one entry is needed")
    return entries


def _where(path: str | Path, key: str, index: int, entry: dict[str, Any]) -> str:
    return f"{path}: {key}[{index}] (id {entry.get('id')!r})"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_int(value) or isinstance(value, str)


def _read_categories(path: str | Path, entries: list[dict[str, Any]]) -> dict[int, str]:
    """Return the category names by ascending id."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = _where(path, "categories", index, entry)
        category_id, name = entry.get("id"), entry.get("name")
        if not _is_int(category_id):
            raise InputError(f"{where}: id must be an integer, got {category_id!r}")
        if category_id in names:
            raise InputError(f"{where}: the id of a category must be unique")
        if not isinstance(name, str):
            raise InputError(f"{where}: name must be a string, got {name!r}")
        names[category_id] = name
    return dict(sorted(names.items()))


def _read_images(
    path: str | Path, entries: list[dict[str, Any]], root: str
) -> dict[int | str, tuple[str, int, int]]:
    """Return (absolute file name, height, width) by image id."""
    images: dict[int | str, tuple[str, int, int]] = {}
    for index, entry in enumerate(entries):
        where = _where(path, "images", index, entry)
        image_id, file_name = entry.get("id"), entry.get("file_name")
        if not _is_id(image_id):
            raise InputError(f"{where}: id must be an integer or a string, got {image_id!r}")
        if image_id in images:
            raise InputError(f"{where}: the id of an image must be unique")
        if not isinstance(file_name, str) or not file_name:
            raise InputError(f"{where}: file_name must be a path, got {file_name!r}")
        for key in ("height", "width"):
            side = entry.get(key)
            if not _is_int(side) or not 0 < side <= _MAX_SIDE:
                raise InputError(f"{where}: {key} must be a number of pixels, got {side!r}")
        images[image_id] = (os.path.join(root, file_name), entry["height"], entry["width"])
    _check_files_exist(path, [image[0] for image in images.values()])
    return images


def _check_files_exist(path: str | Path, file_names: list[str]) -> None:
    # One listing per folder: asking for 100,000 files one by one takes minutes on a network disk.
    folders: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        folder, name = os.path.split(file_name)
        if folder not in folders:
            try:
                folders[folder] = set(os.listdir(folder))
            except (OSError, ValueError):  # ValueError: characters that no path can have
                folders[folder] = set()
        # The second look is for file systems that ignore case.
        if name not in folders[folder] and not os.path.isfile(file_name):
            missing.append(file_name)
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(file_names)} image files are missing, the first is "
            f"{missing[0]!r}: check the image folder"
        )


def _read_references(
    where: str,
    entry: dict[str, Any],
    images: dict[int | str, tuple[str, int, int]],
    class_of: dict[int, int],
) -> tuple[int | str, int]:
    """Return the image id and the category id of an annotation, both known."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not _is_id(image_id) or image_id not in images:
        raise InputError(f"{where}: image_id {image_id!r} is not the id of an entry of 'images'")
    if not _is_int(category_id) or category_id not in class_of:
        raise InputError(
            f"{where}: category_id {category_id!r} is not the id of an entry of 'categories'"
        )
    return image_id, category_id


def _read_box(
    where: str, bbox: Any, height: int, width: int, skip_invalid: bool
) -> np.ndarray | None:
    """Return the XYXY box clipped to the image, or None for one to be skipped."""
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(isinstance(v, float) or _is_int(v) for v in bbox)
        or not all(abs(v) < _MAX_SIDE for v in bbox)  # False for NaN too
    ):
        raise InputError(f"{where}: bbox must be 4 finite numbers [x, y, w, h], got {bbox!r}")
    x, y, w, h = bbox
    box = np.array([max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)], np.float32)
    if box[2] > box[0] and box[3] > box[1]:
        return box
    if skip_invalid:
        return None
    raise InputError(
        f"{where}: bbox [x, y, w, h] {bbox!r} has no area inside its image of width {width} and "
        f"height {height}: correct it, or set SSOD.DATA.SKIP_INVALID_BOXES True to leave such "
        "boxes out"
    )
