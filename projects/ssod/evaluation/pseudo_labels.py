"""
Quality of pseudo-labels against ground truth that training does not see.

N images, R_i pseudo-boxes and M_i true boxes of image i, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

_MATCH_IOU = 0.5  # smallest of a match


@dataclass(frozen=True)
class PseudoLabelQuality:
    """
    Agreement of pseudo-labels with the truth; a ratio without a denominator is 0, never nan.

    Attributes:
        precision: share of the pseudo-boxes that match a true box.
        weighted_precision: the same share by weight.
        recall: share of the true boxes that are matched.
        recall_tail: the same share of the tail's classes.
        num_per_image: mean number of pseudo-boxes an image.
        true_per_image: mean number of true boxes an image.
        class_kl: KL divergence, in nats, of the pseudo-boxes' class distribution from that of the
            true boxes, each with one box a class added so that it is finite.
    """

    precision: float
    weighted_precision: float
    recall: float
    recall_tail: float
    num_per_image: float
    true_per_image: float
    class_kl: float


def pseudo_label_quality(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    classes: Sequence[Tensor],
    true_boxes: Sequence[Tensor],
    true_classes: Sequence[Tensor],
    num_classes: int,
    weights: Sequence[Tensor] | None = None,
    tail: Tensor | None = None,
) -> PseudoLabelQuality:
    """
    Match pseudo-boxes to true boxes of their image and class, best score first.

    Each takes the true box of highest IoU that is still free, if that is at least 0.5,
    as in COCO. All boxes of an image are XYXY pixels of one frame. Tensors may be on any device.

    Args:
        boxes: (R_i, 4) pseudo-boxes of each image, R_i = 0 allowed.
        scores: (R_i,) their scores, in any order.
        classes: (R_i,) int64 in [0, K).
        true_boxes: (M_i, 4) true boxes of each image, M_i = 0 allowed.
        true_classes: (M_i,) int64 in [0, K).
        num_classes: K.
        weights: (R_i,) weights that the boxes are learned with; all 1 if None.
        tail: (K,) bool, classes with few labels as of `tail_classes`; none if None.

    Raises:
        ValueError: if the sequences differ in length.
    """
    found, true, hits = torch.zeros(3, num_classes, dtype=torch.int64).unbind()
    weight_sum, weight_of_hits = 0.0, 0.0
    tail = torch.zeros(num_classes).bool() if tail is None else tail.cpu()
    weights = [torch.ones_like(score) for score in scores] if weights is None else weights
    images = zip(boxes, scores, classes, weights, true_boxes, true_classes, strict=True)
    for box, score, label, weight, true_box, true_label in images:
        order = score.argsort(descending=True, stable=True)
        box, label = box[order].double().cpu(), label[order].cpu()
        true_label = true_label.cpu()
        # Two boxes without area have no IoU.
        ious = box_iou(box, true_box.double().cpu()).nan_to_num()
        ious[label[:, None] != true_label] = 0
        matched = _match_greedily(ious)
        found += label.bincount(minlength=num_classes)
        true += true_label.bincount(minlength=num_classes)
        hits += label[matched].bincount(minlength=num_classes)
        weight = weight[order].double().cpu()
        weight_sum += float(weight.sum())
        weight_of_hits += float(weight[matched].sum())
    num_images, num_hits = max(len(boxes), 1), int(hits.sum())
    return PseudoLabelQuality(
        precision=num_hits / max(int(found.sum()), 1),
        weighted_precision=weight_of_hits / weight_sum if weight_sum else 0.0,
        recall=num_hits / max(int(true.sum()), 1),
        recall_tail=int(hits[tail].sum()) / max(int(true[tail].sum()), 1),
        num_per_image=int(found.sum()) / num_images,
        true_per_image=int(true.sum()) / num_images,
        class_kl=_divergence(true, found),
    )


def tail_classes(class_counts: Tensor) -> Tensor:
    """Return (K,) bool, the third of the classes with the least of (K,) labels, at least one."""
    rank = class_counts.argsort(stable=True).argsort()
    return rank < max(len(class_counts) // 3, 1)


def _divergence(true: Tensor, found: Tensor) -> float:
    p, q = ((counts + 1).double() / (counts + 1).sum() for counts in (true, found))
    return float((p * (p / q).log()).sum())


def _match_greedily(ious: Tensor) -> Tensor:
    """(R,) bool, which rows of (R, M) have taken a column; the first row chooses first."""
    ious = ious.clone()
    matched = torch.zeros(len(ious), dtype=torch.bool)
    if ious.shape[1] == 0:
        return matched
    for row in range(len(ious)):
        iou, column = ious[row].max(dim=0)
        if iou >= _MATCH_IOU:
            matched[row] = True
            ious[:, column] = 0
    return matched
