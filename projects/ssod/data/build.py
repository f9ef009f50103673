"""From `SSOD.DATA.*` to the data sets of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from ssod.data.datasets import (
    DetectionDataset,
    check_disjoint,
    read_coco,
    read_image_folder,
)
from ssod.data.splits import make_split
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


def _read_unlabeled(cfg: CfgNode, labeled: DetectionDataset) -> DetectionDataset | None:
    data = cfg.SSOD.DATA
    if data.UNLABELED_JSON:
        return read_coco(data.UNLABELED_JSON, data.UNLABELED_IMAGES, require_annotations=False)
    if data.UNLABELED_IMAGES:
        return read_image_folder(data.UNLABELED_IMAGES, labeled.class_names, labeled.category_ids)
    return None


def load_run_data(cfg: CfgNode) -> RunData:
    """
    Read, split and check the data sets that a config names.

    Raises:
        InputError: for a missing key or file, damaged data, classes that differ between the
            labeled and the validation set, or images both labeled and unlabeled.
    """
    data, num_classes = cfg.SSOD.DATA, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if not data.LABELED_JSON:
        raise InputError("SSOD.DATA.LABELED_JSON is empty; name a COCO JSON of labeled images")
    labeled = read_coco(
        data.LABELED_JSON, data.LABELED_IMAGES, skip_invalid_boxes=data.SKIP_INVALID_BOXES
    )
    if labeled.num_classes != num_classes:
        raise InputError(
            f"{data.LABELED_JSON}: has {labeled.num_classes} categories, but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; set it to {labeled.num_classes}"
        )
    unlabeled = _read_unlabeled(cfg, labeled)
    hidden_truth = None
    if data.UNLABELED_TRUTH_JSON:
        hidden_truth = read_coco(
            data.UNLABELED_TRUTH_JSON, data.UNLABELED_IMAGES, skip_invalid_boxes=True
        )
    if data.PERCENT:
        if unlabeled is not None:
            raise InputError(
                "SSOD.DATA.PERCENT splits the labeled set and cannot be combined with "
                "SSOD.DATA.UNLABELED_IMAGES; set one of them"
            )
        ids = set(make_split(labeled.image_ids, data.PERCENT, data.SPLIT_SEED))
        unlabeled = labeled.select([i for i in labeled.image_ids if i not in ids])
        hidden_truth = unlabeled
        labeled = labeled.select([i for i in labeled.image_ids if i in ids])
    if unlabeled is not None:
        check_disjoint(labeled, unlabeled)
    val = None
    if data.VAL_JSON:
        val = read_coco(data.VAL_JSON, data.VAL_IMAGES, skip_invalid_boxes=True)
        check_disjoint(labeled, val, "for validation")
    for path, other in ((data.VAL_JSON, val), (data.UNLABELED_TRUTH_JSON, hidden_truth)):
        if other and (other.category_ids, other.class_names) != (
            labeled.category_ids,
            labeled.class_names,
        ):
            raise InputError(
                f"{path}: its categories differ from those of {data.LABELED_JSON}; "
                "both need the same ids and names"
            )
    if cfg.SSOD.UNSUP_LOSS_WEIGHT > 0 and data.UNLABELED_PER_BATCH == 0:
        raise InputError(
            "SSOD.DATA.UNLABELED_PER_BATCH must be at least 1 while SSOD.UNSUP_LOSS_WEIGHT is not 0"
        )
    if cfg.SSOD.UNSUP_LOSS_WEIGHT > 0 and unlabeled is None:
        raise InputError(
            "no unlabeled images: set SSOD.DATA.UNLABELED_IMAGES or SSOD.DATA.PERCENT, or "
            "SSOD.UNSUP_LOSS_WEIGHT 0 for supervised training"
        )
    logger.info(
        "%d labeled images with %d boxes, %s unlabeled, %s for validation",
        len(labeled),
        int(labeled.class_counts.sum()),
        len(unlabeled) if unlabeled else "no",
        len(val) if val else "none",
    )
    return RunData(labeled, unlabeled, val, hidden_truth)
