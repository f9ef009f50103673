"""
torchvision's Faster R-CNN as a `RegionDetector`.

Shape shorthand: N images, R regions of all images, K foreground classes, D embedding size.
torchvision keeps the background in column 0; it becomes column K at this border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    MultiScaleRoIAlign,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    remove_small_boxes,
)
from torchvision.ops.poolers import initLevelMapper

from ssod.core.interfaces import Features, RegionDetector
from ssod.core.sampling import weighted_first
from ssod.core.structures import Detections, ImageBatch, RegionOutput, RegionSamples, Targets

POOLED_LEVELS = (2, 3, 4, 5)  # log2 of the strides that regions are pooled from


class TorchvisionRCNN(RegionDetector, FasterRCNN):
    """
    Faster R-CNN with a four-level FPN, split into the steps of `RegionDetector`.

    Args:
        backbone: features "0" to "3" at strides 4 to 32, and "pool" at 64 for the RPN.
        num_classes: foreground classes K, of which `box_predictor` has one more.
        rpn_anchor_generator: of five levels.
        box_roi_pool: of features "0" to "3".
        rpn_ignore_weight: targets of a smaller weight are ignored by the RPN.
        focal_gamma: exponent of the classification loss, 0 for cross entropy.
        **kwargs: of `torchvision.models.detection.FasterRCNN`, with `box_predictor`.
    """

    background_first = True
    box_loss_beta = 1 / 9  # torchvision's

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        rpn_anchor_generator: AnchorGenerator,
        box_roi_pool: MultiScaleRoIAlign,
        rpn_ignore_weight: float = 0.5,
        focal_gamma: float = 0.0,
        **kwargs: Any,
    ):
        num_anchors = rpn_anchor_generator.num_anchors_per_location()[0]
        super().__init__(
            backbone,
            rpn_anchor_generator=rpn_anchor_generator,
            rpn_head=_Float32RPNHead(backbone.out_channels, num_anchors),
            # Left alone, it infers the scales from the first batch, wrongly for small images.
            box_roi_pool=_pooler_of(box_roi_pool, POOLED_LEVELS),
            **kwargs,
        )
        self.num_classes = num_classes
        self.focal_gamma = focal_gamma
        self.rpn = _IgnoringRPN(self.rpn, rpn_ignore_weight)

    @property
    def mean_color(self) -> Tensor:
        """What torchvision subtracts."""
        return 255 * torch.tensor(self.transform.image_mean)

    def preprocess(self, images: list[Tensor]) -> ImageBatch:
        """Scale N uint8 (3, h, w) images to [0, 1], normalise, and pad to a multiple of 32."""
        normalised = [self.transform.normalize(image.float() / 255) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return ImageBatch(
            self.transform.batch_images(normalised, self.transform.size_divisible), sizes
        )

    def features(self, batch: ImageBatch) -> Features:
        """Return (N, C, h, w) levels "0" to "3" and "pool", fp32 as anchors take their dtype."""
        return {name: level.float() for name, level in self.backbone(batch.tensor).items()}

    def detect(
        self, boxes: Tensor, output: RegionOutput, class_probs: Tensor, size: tuple[int, int]
    ) -> Detections:
        """Detect in (R, 4) regions, maybe none, of (R, K + 1) class_probs, as the host does."""
        heads = self.roi_heads
        boxes = clip_boxes_to_image(self.decode(boxes, output.deltas), size)
        region, classes = torch.where(class_probs[:, :-1] > heads.score_thresh)
        boxes, scores = boxes[region, classes], class_probs[region, classes]
        large = remove_small_boxes(boxes, min_size=1e-2)
        kept = large[batched_nms(boxes[large], scores[large], classes[large], heads.nms_thresh)]
        kept = kept[: heads.detections_per_img]
        region = region[kept]
        return Detections(
            boxes[kept], scores[kept], classes[kept], class_probs[region], output.embeddings[region]
        )

    def propose(
        self, features: Features, batch: ImageBatch, targets: list[Targets] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return (P_i, 4) proposals of each image and, of (M_i,) targets in train mode, losses."""
        images = ImageList(batch.tensor, batch.sizes)
        host_targets = targets and [{"boxes": t.boxes, "weights": t.weights} for t in targets]
        proposals, losses = self.rpn(images, features, host_targets)
        names = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc"}
        return proposals, {names[name]: loss for name, loss in losses.items()}

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], targets: list[Targets]) -> RegionSamples:
        """Draw R regions of (P_i, 4) proposals and (M_i,) targets' boxes as `RoIHeads` does."""
        heads = self.roi_heads
        proposals = heads.add_gt_proposals(proposals, [target.boxes for target in targets])
        pairs = zip(proposals, targets, strict=True)
        found = [(boxes, *self._match(boxes, target)) for boxes, target in pairs]
        drawn = heads.subsample([labels for _, _, labels in found])
        boxes, matched, labels = zip(
            *([v[d] for v in values] for values, d in zip(found, drawn, strict=True)), strict=True
        )
        classes = [torch.where(label == 0, self.num_classes, label - 1) for label in labels]
        return RegionSamples.from_matches(
            list(boxes), classes, list(matched), targets, self.num_classes
        )

    def _match(self, boxes: Tensor, target: Targets) -> tuple[Tensor, Tensor]:
        """The target's row and label of each (P, 4) region: 0 for background, -1 for neither."""
        if not len(target):
            background = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            return background, background
        matcher, sampler = self.roi_heads.proposal_matcher, self.roi_heads.fg_bg_sampler
        overlaps, surplus = weighted_first(
            box_iou(target.boxes, boxes),
            target.weights,
            matcher.high_threshold,
            int(sampler.batch_size_per_image * sampler.positive_fraction),
        )
        matched = matcher(overlaps)
        rows = matched.clamp(min=0)
        labels = (target.classes + 1)[rows].masked_fill(matched == matcher.BELOW_LOW_THRESHOLD, 0)
        ignored = surplus | (matched == matcher.BETWEEN_THRESHOLDS)
        return rows, labels.masked_fill(ignored, -1)

    def score_regions(
        self, features: Features, boxes: list[Tensor], stride_shift: int = 0
    ) -> RegionOutput:
        """Pool and score R = sum(R_i) regions, (R_i, 4) of each image; R = 0 is allowed."""
        pool = self.roi_heads.box_roi_pool
        if stride_shift:
            pool = _pooler_of(pool, POOLED_LEVELS[stride_shift:])
        embeddings = self.roi_heads.box_head(pool(features, boxes, image_shapes=[])).float()
        logits, deltas = self.roi_heads.box_predictor(embeddings)
        deltas = deltas.float().reshape(len(deltas), self.num_classes + 1, 4)
        return RegionOutput(logits.float().roll(-1, dims=1), deltas[:, 1:], embeddings)

    def levels(self, boxes: list[Tensor]) -> Tensor:
        """Return (R,) levels, 2 to 5, of (R_i, 4) regions of each image."""
        return self.roi_heads.box_roi_pool.map_levels(boxes) + POOLED_LEVELS[0]

    def encode(self, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        """Return the (R, 4) deltas from (R, 4) boxes to (R, 4) others, none of them empty."""
        return self.roi_heads.box_coder.encode([gt_boxes], [boxes])[0]

    def decode(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Apply (R, K, 4) deltas to (R, 4) boxes, giving (R, K, 4) boxes."""
        decoded = self.roi_heads.box_coder.decode(deltas.flatten(1), [boxes])
        return decoded.reshape(deltas.shape)

    @property
    def score_floor(self) -> float:
        """Detections have a higher score."""
        return self.roi_heads.score_thresh

    @score_floor.setter
    def score_floor(self, floor: float) -> None:
        self.roi_heads.score_thresh = floor

    @property
    def classifier(self) -> nn.Linear:
        """The layer from D to K + 1, background first."""
        return self.roi_heads.box_predictor.cls_score


class _Float32RPNHead(RPNHead):
    """torchvision's, answering in fp32 also under autocast: boxes need more than 3 digits."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class _IgnoringRPN(RegionProposalNetwork):
    """The parts of an RPN with ignored targets, and losses that are defined without samples."""

    def __init__(self, rpn: RegionProposalNetwork, ignore_weight: float):
        super().__init__(
            rpn.anchor_generator,
            rpn.head,
            rpn.proposal_matcher.high_threshold,
            rpn.proposal_matcher.low_threshold,
            rpn.fg_bg_sampler.batch_size_per_image,
            rpn.fg_bg_sampler.positive_fraction,
            rpn._pre_nms_top_n,
            rpn._post_nms_top_n,
            rpn.nms_thresh,
            rpn.score_thresh,
        )
        self.ignore_weight = ignore_weight

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched_boxes = [], []
        for anchor, target in zip(anchors, targets, strict=True):
            if len(target["boxes"]) == 0:
                labels.append(anchor.new_zeros(len(anchor)))
                matched_boxes.append(torch.zeros_like(anchor))
                continue
            matched = self.proposal_matcher(self.box_similarity(target["boxes"], anchor))
            rows, is_object = matched.clamp(min=0), matched >= 0
            ignored = is_object & (target["weights"][rows] < self.ignore_weight)
            ignored |= matched == self.proposal_matcher.BETWEEN_THRESHOLDS
            labels.append(is_object.to(anchor).masked_fill(ignored, -1))
            matched_boxes.append(target["boxes"][rows])
        return labels, matched_boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        losses = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        # torchvision divides by the number of samples, which is NaN if every anchor is ignored.
        nothing = (torch.cat(labels) < 0).all()
        return losses[0].masked_fill(nothing, 0), losses[1].masked_fill(nothing, 0)


def _pooler_of(pooler: MultiScaleRoIAlign, levels: Sequence[int]) -> MultiScaleRoIAlign:
    """A pooler of these levels, given as the finest features, of regions of any size."""
    new = MultiScaleRoIAlign(
        pooler.featmap_names[: len(levels)],
        pooler.output_size,
        pooler.sampling_ratio,
        canonical_scale=pooler.canonical_scale,
        canonical_level=pooler.canonical_level,
    )
    new.scales = [2.0**-level for level in levels]
    new.map_levels = initLevelMapper(
        levels[0], levels[-1], new.canonical_scale, new.canonical_level
    )
    return new
