"""
Reader of COCO detection annotations.

Whatever is wrong with a file ends as an `InputError` that names the file and the entry.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data.reading import (
    MAX_SIDE,
    MISSING_FILES,
    REPEATED,
    OnProblem,
    clip_box,
    skipping_boxes,
    stop,
)
from ssod.data.records import DetectionDataset, ImageRecord
from ssod.errors import InputError


def read_coco(
    json_path: str | Path,
    image_root: str | Path,
    *,
    skip_invalid_boxes: bool = False,
    require_annotations: bool = True,
    on_problem: OnProblem = stop,
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
        on_problem: what to do about an entry that cannot be used; it is left out afterwards.

    Raises:
        InputError: if the file is missing or not valid COCO, or an image file is missing. With
            another `on_problem` only if nothing can be read.
    """
    content = _load(json_path)
    image_entries = _entries(json_path, content, "images", required=True)
    category_entries = _entries(json_path, content, "categories", required=require_annotations)
    images = _read_images(json_path, image_entries, os.path.abspath(image_root), on_problem)
    names = _read_categories(json_path, category_entries, on_problem)
    boxes: dict[int | str, list[np.ndarray]] = defaultdict(list)
    classes: dict[int | str, list[int]] = defaultdict(list)
    if require_annotations:
        class_of = {category_id: k for k, category_id in enumerate(names)}
        entries = _entries(json_path, content, "annotations", required=True)
        with skipping_boxes(json_path, skip_invalid_boxes, on_problem) as report:
            for image_id, category_id, box in _read_boxes(
                json_path, entries, images, class_of, report
            ):
                boxes[image_id].append(box)
                classes[image_id].append(class_of[category_id])
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


def to_coco(dataset: DetectionDataset) -> dict[str, Any]:
    """Return the content of a COCO annotation file with the images and boxes of a set."""
    annotations = []
    records = [dataset[index] for index in range(len(dataset))]
    for record in records:
        rows = zip(record.boxes.tolist(), record.classes.tolist(), strict=True)
        for (x0, y0, x1, y1), label in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": dataset.category_ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    images = [
        {"id": r.image_id, "file_name": r.file_name, "height": r.height, "width": r.width}
        for r in records
    ]
    names = zip(dataset.category_ids, dataset.class_names, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in names]
    return {"images": images, "annotations": annotations, "categories": categories}


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


def _read_categories(
    path: str | Path, entries: list[dict[str, Any]], on_problem: OnProblem
) -> dict[int, str]:
    """Return the category names by ascending id."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = _where(path, "categories", index, entry)
        category_id, name = entry.get("id"), entry.get("name")
        try:
            if not _is_int(category_id):
                raise InputError(f"{where}: id must be an integer, got {category_id!r}")
            if category_id in names:
                raise InputError(f"{where}: the id of a category must be unique")
            if not isinstance(name, str):
                raise InputError(f"{where}: name must be a string, got {name!r}")
        except InputError as error:
            on_problem("categories", error)
            continue
        names[category_id] = name
    return dict(sorted(names.items()))


_Image = tuple[str, int, int]  # absolute file name, height, width


def _read_images(
    path: str | Path, entries: list[dict[str, Any]], root: str, on_problem: OnProblem
) -> dict[int | str, _Image]:
    """Return the images by their id."""
    images: dict[int | str, _Image] = {}
    for index, entry in enumerate(entries):
        where = _where(path, "images", index, entry)
        try:
            image = _read_image_entry(where, entry, root)
            if entry["id"] in images:
                raise InputError(f"{where}: the id of an image must be unique")
        except InputError as error:
            on_problem("image entries", error)
            continue
        images[entry["id"]] = image
    _check_files_exist(path, [image[0] for image in images.values()], on_problem)
    return images


def _read_image_entry(where: str, entry: dict[str, Any], root: str) -> _Image:
    image_id, file_name = entry.get("id"), entry.get("file_name")
    if not _is_id(image_id):
        raise InputError(f"{where}: id must be an integer or a string, got {image_id!r}")
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where}: file_name must be a path, got {file_name!r}")
    for key in ("height", "width"):
        side = entry.get(key)
        if not _is_int(side) or not 0 < side <= MAX_SIDE:
            raise InputError(f"{where}: {key} must be a number of pixels, got {side!r}")
    return os.path.join(root, file_name), entry["height"], entry["width"]


def _check_files_exist(path: str | Path, file_names: list[str], on_problem: OnProblem) -> None:
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
        message = (
            f"{path}: {len(missing)} of {len(file_names)} image files are missing, the first is "
            f"{missing[0]!r}: check the image folder"
        )
        on_problem(MISSING_FILES, InputError(message))


def _read_boxes(
    path: str | Path,
    entries: list[dict[str, Any]],
    images: dict[int | str, _Image],
    class_of: dict[int, int],
    on_problem: OnProblem,
) -> Iterator[tuple[int | str, int, np.ndarray]]:
    """Yield image id, category id and clipped box of each annotation but crowds."""
    for index, entry in enumerate(entries):
        where = _where(path, "annotations", index, entry)
        try:
            image_id, category_id = _read_references(where, entry, images, class_of)
            if entry.get("iscrowd", 0) == 1:
                continue
            x, y, w, h = _read_bbox(where, entry.get("bbox"))
        except InputError as error:
            on_problem("annotations", error)
            continue
        box = clip_box(where, (x, y, x + w, y + h), *images[image_id][1:], on_problem)
        if box is not None:
            yield image_id, category_id, box
    ids = Counter(entry["id"] for entry in entries if _is_id(entry.get("id")))
    for annotation_id in (i for i, count in ids.items() if count > 1):
        message = f"{path}: {ids[annotation_id]} annotations have the id {annotation_id!r}"
        on_problem(REPEATED, InputError(f"{message}; some tools read one of them only"))


def _read_references(
    where: str,
    entry: dict[str, Any],
    images: dict[int | str, _Image],
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


def _read_bbox(where: str, bbox: Any) -> list[float]:
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(isinstance(v, float) or _is_int(v) for v in bbox)
        or not all(abs(v) < MAX_SIDE for v in bbox)  # False for NaN too
    ):
        raise InputError(f"{where}: bbox must be 4 finite numbers [x, y, w, h], got {bbox!r}")
    return bbox
