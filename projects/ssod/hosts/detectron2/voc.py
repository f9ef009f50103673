"""Validation sets in Pascal VOC files of `SSOD.DATA`, for Detectron2's evaluator."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ssod.data import build
from ssod.data.datasets import DetectionDataset
from ssod.errors import InputError


def register_voc(cfg: CfgNode, val: DetectionDataset | None = None) -> str:
    """
    Register `SSOD.DATA.VAL_VOC` in `DatasetCatalog`, under the paths of the files and the images.

    It is measured as COCO measures, like `VAL_JSON`.

    Args:
        cfg: names the files.
        val: what they hold, with the classes of the labeled files; None to read both.

    Returns:
        The name.

    Raises:
        InputError: if the labeled images are not named by their files, and as `read_labeled` and
            `read_val` of `ssod.data.build`.
    """
    files = cfg.SSOD.DATA
    name = f"voc:{os.path.abspath(files.VAL_VOC)}:{os.path.abspath(files.VAL_IMAGES)}"
    if name not in DatasetCatalog.list():
        if cfg.DATASETS.TRAIN:
            raise InputError(
                "SSOD.DATA.VAL_VOC needs labeled images in SSOD.DATA, whose classes it has; with "
                "DATASETS.TRAIN set DATASETS.TEST instead"
            )
        if val is None:
            val = build.read_val(cfg, build.read_labeled(cfg))
        DatasetCatalog.register(name, partial(standard_format, val))
        MetadataCatalog.get(name).set(
            evaluator_type="coco",
            thing_classes=val.class_names,
            thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(val.category_ids)},
        )
    return name


def standard_format(dataset: DetectionDataset) -> list[dict[str, Any]]:
    """Return the images and boxes of a set as Detectron2's catalog has them."""
    return [
        {
            "file_name": record.file_name,
            "image_id": record.image_id,
            "height": record.height,
            "width": record.width,
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
                for box, label in zip(record.boxes.tolist(), record.classes.tolist(), strict=True)
            ],
        }
        for record in dataset
    ]
