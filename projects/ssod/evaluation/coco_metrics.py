"""COCO box metrics of one prediction list, by the fastest evaluator installed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOW_SCORE_FLOOR = 0.001
LOW_FLOOR_AP = f"AP_floor_{LOW_SCORE_FLOOR}"
"""AP of detections above that score, which many published results are; no class has such a name."""


def detections_to_coco(
    image_id: int, boxes: Tensor, scores: Tensor, classes: Tensor, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """
    Turn the detections of one image into COCO result entries.

    Args:
        image_id: COCO id of the image.
        boxes: (R, 4) XYXY pixels of the image as it is on disk; R = 0 gives an empty list.
        scores: (R,) in [0, 1].
        classes: (R,) int64 index into `category_ids`.
        category_ids: COCO id of each class.

    Returns:
        R dictionaries with `image_id`, `category_id`, `bbox` (XYWH) and `score`.
    """
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    rows = zip(xywh.tolist(), scores.tolist(), classes.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in rows
    ]


def coco_metrics(
    truth: dict[str, Any] | str | Path, predictions: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """
    Average precision and recall as COCO defines them, in percent.

    Uses `faster_coco_eval` if it is installed and `pycocotools` otherwise; both give the same
    numbers. Nothing is printed and the arguments are not changed.

    Args:
        truth: COCO ground truth, or the path of its JSON file. Where they are missing `iscrowd` is
            0 and `area` that of the box.
        predictions: COCO results with `image_id`, `category_id`, `bbox` (XYWH pixels), `score`.

    Returns:
        `AP`, `AP50`, `AP75`, `AP_S`, `AP_M`, `AP_L`, `AR100` and one `AP-<name>` a category.
        Without predictions they are 0; nan where there is no ground truth to find.

    Raises:
        ValueError: if a prediction names an image or a category that `truth` does not have.
    """
    if not isinstance(truth, dict):
        truth = json.loads(Path(truth).read_bytes())
    for key, known in (("image_id", "images"), ("category_id", "categories")):
        unknown = {p[key] for p in predictions} - {entry["id"] for entry in truth[known]}
        if unknown:
            raise ValueError(
                f"Predictions must be of the {known} in the ground truth, "
                f"which lacks {key} {sorted(unknown)[:5]}"
            )
    # Renumbered: the evaluators take a match with annotation id 0 for none, and one of them takes
    # whole numbers only as ids of images.
    image_numbers = {image["id"]: n for n, image in enumerate(truth["images"], start=1)}
    truth = {**truth, "images": [{**i, "id": image_numbers[i["id"]]} for i in truth["images"]]}

    def entries(annotations: Iterable[dict]) -> list[dict]:
        return [
            {
                **a,
                "id": n,
                "image_id": image_numbers[a["image_id"]],
                "area": a.get("area", a["bbox"][2] * a["bbox"][3]),
                "iscrowd": a.get("iscrowd") or 0,
            }
            for n, a in enumerate(annotations, start=1)
        ]

    objects, found = entries(truth.get("annotations", [])), entries(predictions)
    with contextlib.redirect_stdout(io.StringIO()):
        precision, recall = _evaluate(truth, objects, found)
    # precision: (IoU, recall level, category, size band, most detections); recall without levels.
    ious = {"AP": slice(None), "AP50": 0, "AP75": 5}
    metrics = {name: _percent(precision[index, ..., 0, -1]) for name, index in ious.items()}
    for band, name in enumerate(("AP_S", "AP_M", "AP_L"), start=1):
        metrics[name] = _percent(precision[..., band, -1])
    metrics["AR100"] = _percent(recall[..., 0, -1])
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    for index, category in enumerate(categories):
        metrics[f"AP-{category['name']}"] = _percent(precision[:, :, index, 0, -1])
    return metrics


def _evaluate(truth: dict, objects: list[dict], found: list[dict]) -> tuple[np.ndarray, ...]:
    """Precision and recall tables of the evaluator, -1 where there is nothing to find."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

        logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # six lines an evaluation
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    def index(annotations: list[dict]) -> COCO:
        coco = COCO()
        images = [dict(image) for image in truth["images"]]
        coco.dataset = {**truth, "images": images, "annotations": annotations}
        coco.createIndex()
        return coco

    evaluator = COCOeval(index(objects), index(found), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _percent(table: np.ndarray) -> float:
    valid = table[table > -1]
    return 100 * float(valid.mean()) if valid.size else float("nan")
