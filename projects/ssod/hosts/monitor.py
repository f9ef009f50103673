"""What pseudo-labels are like while a run trains."""

from __future__ import annotations

import logging
import math

import torch
from fvcore.common.config import CfgNode

from ssod.core.teacher_student import TeacherStudent
from ssod.data.datasets import DetectionDataset, ImageRecord
from ssod.data.images import read_image
from ssod.errors import InputError
from ssod.evaluation.pseudo_labels import pseudo_label_quality
from ssod.hosts.inference import label_images

logger = logging.getLogger(__name__)

MONITORED_IMAGES = 100  # unlabeled images whose pseudo-labels are compared with hidden truth


def choose_monitored(hidden_truth: DetectionDataset | None) -> DetectionDataset | None:
    """
    Choose some unlabeled images with hidden truth.

    Like training it leaves out images that cannot be decoded, and those of another size than their
    annotations say, which training on unlabeled images does not ask.
    """
    if hidden_truth is None:
        return None
    first = (hidden_truth[i] for i in range(min(MONITORED_IMAGES, len(hidden_truth))))
    return hidden_truth.select([record.image_id for record in first if _is_usable(record)])


def _is_usable(record: ImageRecord) -> bool:
    try:
        return read_image(record.file_name).shape[:2] == (record.height, record.width)
    except InputError:
        return False


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
        `pseudo/precision` and `pseudo/recall` in [0, 1], boxes per image, and the KL divergence of
        their class distribution in nats, all of the boxes with a weight above 0; empty before
        the teacher has started and without images.
    """
    if not images or not model.teacher_started:
        return {}
    labeled = [
        (record, found[found.weights > 0])
        for record, found in label_images(model, images, cfg, device)
    ]
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
        "pseudo/class_kl": quality.class_kl,
    }


class WeightAlarm:
    """
    Warns once when pseudo-labels weigh next to nothing, or all of them fully, for long.

    A mean weight near 0 means that nothing is learned from unlabeled images, one near 1 that the
    filter does not distinguish; both are how SoftMatch fails in other tasks. A fixed threshold
    has weight 1 by definition, so only its lack of boxes is told.
    """

    LOW, HIGH = 0.2, 0.97
    PATIENCE = 500  # iterations

    def __init__(self, weighs: bool):
        """
        Start.

        Args:
            weighs: whether the filter gives weights other than 1.
        """
        self._highest = self.HIGH if weighs else math.inf
        self._since: int | None = None
        self._warned = False

    def update(self, iteration: int, metrics: dict[str, float]) -> None:
        """Look at a line of metrics; one of the burn-in says nothing."""
        weight = metrics.get("pseudo/mean_weight")
        if weight is None or self.LOW <= weight <= self._highest:
            self._since = None
            return
        self._since = iteration if self._since is None else self._since
        if iteration - self._since >= self.PATIENCE and not self._warned:
            self._warned = True
            logger.warning(
                "iteration %d: the mean weight of pseudo-labels has been %.2f or so for %d "
                "iterations, with %.2f boxes per image; expected %.2f to %.2f. Look at "
                "SSOD.FILTER.*, or lengthen SSOD.BURN_IN_ITERS",
                iteration,
                weight,
                iteration - self._since,
                metrics.get("pseudo/num_per_image", 0.0),
                self.LOW,
                self.HIGH,
            )
