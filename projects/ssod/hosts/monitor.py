"""What pseudo-labels are like while a run trains."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode

from ssod.core.teacher_student import TeacherStudent
from ssod.data.datasets import DetectionDataset
from ssod.data.images import is_readable
from ssod.evaluation.pseudo_labels import pseudo_label_quality
from ssod.hosts.inference import label_images

MONITORED_IMAGES = 100  # unlabeled images whose pseudo-labels are compared with hidden truth


def choose_monitored(hidden_truth: DetectionDataset | None) -> DetectionDataset | None:
    """Choose some unlabeled images with hidden truth; like training, leave broken ones out."""
    if hidden_truth is None:
        return None
    first = (hidden_truth[i] for i in range(min(MONITORED_IMAGES, len(hidden_truth))))
    ids = [record.image_id for record in first if is_readable(record.file_name)]
    return hidden_truth.select(ids)


def monitor_pseudo_labels(
    model: TeacherStudent,
    images: DetectionDataset | None,
    cfg: CfgNode,
    device: torch.device,
) -> dict[str, float]:
    """
    Compare pseudo-labels with the truth that training never sees.

    Args:
        model: its teacher and its filter label the images.
        images: from `choose_monitored`.
        cfg: test sizes and workers.
        device: of the model.

    Returns:
        `pseudo/precision`, `pseudo/recall` in [0, 1] and boxes per image; empty before the
        teacher has started and without images.
    """
    if not images or not model.teacher_started:
        return {}
    labeled = label_images(model, images, cfg, device)
    quality = pseudo_label_quality(
        [found.boxes for _, found in labeled],
        [found.scores for _, found in labeled],
        [found.classes for _, found in labeled],
        [torch.from_numpy(record.boxes) for record, _ in labeled],
        [torch.from_numpy(record.classes) for record, _ in labeled],
        images.num_classes,
    )
    return {
        "pseudo/precision": quality.precision,
        "pseudo/recall": quality.recall,
        "pseudo/boxes_per_image": quality.num_per_image,
        "pseudo/true_boxes_per_image": quality.true_per_image,
    }
