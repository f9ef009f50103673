"""What pseudo-labels are like while a run trains."""

from __future__ import annotations

import logging
import math

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from ssod.core.teacher_student import TeacherStudent
from ssod.data.datasets import DetectionDataset, ImageRecord
from ssod.data.images import read_image
from ssod.errors import InputError
from ssod.evaluation.pseudo_labels import pseudo_label_quality, tail_classes
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
    labeled_counts: Tensor,
    cfg: CfgNode,
    device: torch.device,
) -> dict[str, float]:
    """
    Compare pseudo-labels of the images of `choose_monitored` with the truth.

    Args:
        model: of which the teacher labels.
        images: of `choose_monitored`.
        labeled_counts: (K,) labeled boxes of each class.
        cfg: of the run.
        device: of the model.

    Returns:
        `pseudo/precision`, `pseudo/weighted_precision` and `pseudo/recall` in [0, 1], that of the
        third of the classes with the fewest labeled boxes in `pseudo/recall_tail`, boxes per image,
        and the KL divergence of their classes in nats if there are any, all of the boxes
        that are learned (`reliable`); empty without images, and until teacher and filter are ready.
    """
    if not images or not (model.teacher_started and model.pseudo_label_filter.is_ready):
        return {}
    labeled = [
        (record, found[found.reliable])
        for record, found in label_images(model, images, cfg, device)
    ]
    quality = pseudo_label_quality(
        [found.boxes for _, found in labeled],
        [found.scores for _, found in labeled],
        [found.classes for _, found in labeled],
        [torch.from_numpy(record.boxes) for record, _ in labeled],
        [torch.from_numpy(record.classes) for record, _ in labeled],
        images.num_classes,
        weights=[found.weights for _, found in labeled],
        tail=tail_classes(labeled_counts),
    )
    metrics = {
        "pseudo/precision": quality.precision,
        "pseudo/weighted_precision": quality.weighted_precision,
        "pseudo/recall": quality.recall,
        "pseudo/recall_tail": quality.recall_tail,
        "pseudo/boxes_per_image": quality.num_per_image,
        "pseudo/true_boxes_per_image": quality.true_per_image,
    }
    return metrics | ({"pseudo/class_kl": quality.class_kl} if quality.num_per_image else {})


class WeightAlarm:
    """
    Warns once when no pseudo-label is kept for long, or when their weights say nothing.

    A mean weight near 0 means that nothing is learned from unlabeled images, one near 1 that the
    filter does not distinguish; both are how SoftMatch fails in other tasks.
    """

    LOW, HIGH = 0.2, 0.97
    PATIENCE = 500  # iterations

    def __init__(self, is_soft: bool):
        """Start; `is_soft` tells whether the filter gives weights other than 1."""
        self._is_soft = is_soft
        self._since: int | None = None
        self._num = self._weight = 0.0
        self._warned = False

    def update(self, iteration: int, metrics: dict[str, float]) -> None:
        """Look at what `MetricWindow.read` returns; the burn-in says nothing."""
        if "pseudo/num_per_image" not in metrics or self._warned:
            return
        self._since = iteration if self._since is None else self._since
        self._num += metrics["pseudo/num_per_image"]
        self._weight += metrics["pseudo/num_per_image"] * metrics.get("pseudo/mean_weight", 0.0)
        if iteration - self._since < self.PATIENCE:
            return
        mean = self._weight / self._num if self._num else 0.0
        if not self._num or (self._is_soft and not self.LOW <= mean <= self.HIGH):
            self._warned = True
            found = f"have a mean weight of {mean:.2f}" if self._num else "do not exist"
            logger.warning(
                "iteration %d: for %d iterations pseudo-labels %s; look at SSOD.FILTER.*, or "
                "lengthen SSOD.BURN_IN_ITERS",
                iteration,
                iteration - self._since,
                found,
            )
        self._since, self._num, self._weight = None, 0.0, 0.0


class BoundAlarm:
    """
    Warns once of each metric of a method whose mean was above its bound for long.

    Prototypes that point in one direction make DASO's classes random; counts that jump from window
    to window mean that its blending drives them. A contrast that pulls everything together, as it
    can where nearly all pseudo-boxes are of one class, teaches nothing.
    """

    PATIENCE = 500  # iterations
    BOUNDS = {
        "pseudo/daso_prototype_cosine": (
            *(0.9, "DASO's prototypes had a mean cosine of %.2f"),
            "look at SSOD.DASO.T_PROTO, or lower SSOD.DASO.MAX_BLEND",
        ),
        "pseudo/daso_window_change": (
            *(0.3, "DASO's windows of counted classes had a difference of %.2f"),
            "look at SSOD.DASO.WINDOW, or lower SSOD.DASO.MAX_BLEND",
        ),
        "pseudo/contrast_other_class_cosine": (
            *(0.9, "embeddings of different classes had a mean cosine of %.2f"),
            "lower SSOD.CONTRASTIVE.WEIGHT, or raise SSOD.CONTRASTIVE.PUSH_THRESH",
        ),
    }

    def __init__(self) -> None:
        """Start; nothing is known yet."""
        self._since: dict[str, int] = {}
        self._values: dict[str, list[float]] = {name: [] for name in self.BOUNDS}

    def update(self, iteration: int, metrics: dict[str, float]) -> None:
        """Look at what `MetricWindow.read` returns; what is not there says nothing."""
        for name in self._values.keys() & metrics.keys():
            if "daso" in name and not metrics["pseudo/daso_coefficient"]:
                continue  # nothing is blended yet
            since = self._since.setdefault(name, iteration)
            if math.isfinite(metrics[name]):  # not without anything to measure
                self._values[name].append(metrics[name])
            if iteration - since < self.PATIENCE:
                continue
            values = self._values.pop(name)
            mean = sum(values) / max(len(values), 1)
            bound, found, advice = self.BOUNDS[name]
            if mean > bound:
                text = f"iteration %d: for %d iterations {found}, more than %.1f; {advice}"
                logger.warning(text, iteration, iteration - since, mean, bound)
            else:
                self._values[name] = []
                del self._since[name]
