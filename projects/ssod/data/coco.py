"""
Reader of COCO detection annotations.

Whatever is wrong with a file ends as an `InputError` that names the file and the entry.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data.coco_file import describe_entry, is_crowd, load_coco
from ssod.data.reading import MISSING_FILES, XYWH, OnProblem, read_box, skipping_boxes, stop
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
    options = {"require_annotations": require_annotations, "on_problem": on_problem}
    file = load_coco(json_path, **options)
    root = os.path.abspath(image_root)
    files = {i: os.path.join(root, entry["file_name"]) for i, entry in file.images.items()}
    _check_files_exist(json_path, list(files.values()), on_problem)
    boxes: dict[int | str, list[np.ndarray]] = defaultdict(list)
    classes: dict[int | str, list[int]] = defaultdict(list)
    class_of = {category_id: k for k, category_id in enumerate(file.names)}
    with skipping_boxes(json_path, skip_invalid_boxes, on_problem) as report:
        for index, entry in file.annotations.items():
            if is_crowd(entry):
                continue
            where = describe_entry(json_path, "annotations", index, entry)
            image = file.images[entry["image_id"]]
            size = (image["height"], image["width"])
            box = read_box(where, entry.get("bbox"), XYWH, *size, report)
            if box is not None:
                boxes[entry["image_id"]].append(box)
                classes[entry["image_id"]].append(class_of[entry["category_id"]])
    records = (
        ImageRecord.from_rows(
            i, files[i], (image["height"], image["width"]), boxes.get(i, ()), classes.get(i, ())
        )
        for i, image in file.images.items()
    )
    return DetectionDataset(records, list(file.names.values()), list(file.names))


def to_coco(dataset: DetectionDataset) -> dict[str, Any]:
    """Return the content of a COCO annotation file with the images and boxes of a set."""
    annotations = []
    for record in dataset:
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
        for r in dataset
    ]
    return {"images": images, "annotations": annotations, "categories": dataset.categories}


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
