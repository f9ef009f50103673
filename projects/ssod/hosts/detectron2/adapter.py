"""
Detectron2's `GeneralizedRCNN` as a `RegionDetector`.

Shape shorthand: N images, R regions of all images, K foreground classes, D embedding size.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ssod.core.interfaces import Features, RegionDetector
from ssod.core.sampling import weighted_first
from ssod.core.structures import Detections, ImageBatch, RegionOutput, RegionSamples, Targets
from ssod.errors import InputError


@PROPOSAL_GENERATOR_REGISTRY.register()
class IgnoringRPN(RPN):
    """
    Detectron2's RPN, except that anchors matched to targets of low weight are ignored.

    Args:
        ignore_weight: anchors of targets with a smaller `gt_weights` are neither object nor
            background.
        **kwargs: of `RPN`.
    """

    @configurable
    def __init__(self, *, ignore_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.ignore_weight = ignore_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict) -> dict[str, Any]:
        """Add `SSOD.RPN_IGNORE_WEIGHT` to the arguments of `RPN`."""
        arguments = super().from_config(cfg, input_shape)
        return arguments | {"ignore_weight": cfg.SSOD.RPN_IGNORE_WEIGHT}

    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """
        Label as `RPN` does, but ignore what matches a target of low weight.

        It is ignored before the sampling, so that it takes no trusted anchor's place.
        """
        matcher, found = self.anchor_matcher, []
        try:
            # One image at a time: a matcher is not told whose overlaps it is given.
            for target in gt_instances:
                ignored = target.gt_weights < self.ignore_weight
                self.anchor_matcher = functools.partial(_match, matcher, ignored)
                found.append(super().label_and_sample_anchors(anchors, [target]))
        finally:
            self.anchor_matcher = matcher
        return [labels for (labels,), _ in found], [boxes for _, (boxes,) in found]


def _match(matcher: Matcher, ignored: Tensor, overlaps: Tensor) -> tuple[Tensor, Tensor]:
    """Match (M, A) overlaps of targets and anchors; objects of the (M,) ignored ones become -1."""
    matched, labels = matcher(overlaps)
    if len(ignored):
        # Detectron2 may have moved the overlaps to the CPU, for want of memory.
        is_ignored = ignored.to(matched.device)[matched]
        labels = labels.masked_fill((labels == 1) & is_ignored, -1)
    return matched, labels


def _match_weighted_first(
    matcher: Matcher, overlaps: Tensor, weights: Tensor, max_objects: int
) -> tuple[Tensor, Tensor]:
    """Match (M, P) overlaps of targets, of weights (M,), and regions; surplus objects become -1."""
    overlaps, surplus = weighted_first(overlaps, weights, matcher.thresholds[-2], max_objects)
    matched, labels = matcher(overlaps)
    return matched, labels.masked_fill(surplus, -1)


class Detectron2RCNN(RegionDetector, GeneralizedRCNN):
    """
    `GeneralizedRCNN` with an FPN and `StandardROIHeads`, split into `RegionDetector`'s steps.

    In train mode Detectron2's parts log to the current `EventStorage`, which must exist.

    Args:
        focal_gamma: exponent of the classification loss, 0 for cross entropy.
        canonical_box_size: square root of the area, in pixels, of boxes pooled from level 4.
        **kwargs: of `GeneralizedRCNN`.

    Raises:
        InputError: for heads that are not supported, saying which are.
    """

    @configurable
    def __init__(self, *, focal_gamma: float, canonical_box_size: int, **kwargs: Any):
        super().__init__(**kwargs)
        _check_supported(self)
        self.focal_gamma = focal_gamma
        self.box_loss_beta = self.roi_heads.box_predictor.smooth_l1_beta
        self.loss_weights = self.roi_heads.box_predictor.loss_weight
        self.roi_heads.box_pooler.canonical_box_size = canonical_box_size
        self.num_classes = self.roi_heads.num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Add keys of `SSOD` to the arguments of `GeneralizedRCNN`."""
        # Before Detectron2 builds them: its assertions say nothing of what is supported.
        for group, name in (
            ("PROPOSAL_GENERATOR", "IgnoringRPN"),
            ("ROI_HEADS", "StandardROIHeads"),
        ):
            if cfg.MODEL[group].NAME != name:
                raise _not_supported(f"MODEL.{group}.NAME {cfg.MODEL[group].NAME}")
        own = {
            "focal_gamma": cfg.SSOD.FOCAL_GAMMA,
            "canonical_box_size": cfg.SSOD.CANONICAL_BOX_SIZE,
        }
        return super().from_config(cfg) | own

    @property
    def mean_color(self) -> Tensor:
        """`MODEL.PIXEL_MEAN` in the order RGB."""
        return self.pixel_mean.flatten().flip(0 if self.input_format == "BGR" else ())

    def preprocess(self, images: list[Tensor]) -> ImageBatch:
        """Order channels of N uint8 (3, h, w) images as `INPUT.FORMAT` says, normalise and pad."""
        if self.input_format == "BGR":
            images = [image.flip(0) for image in images]
        batch = self.preprocess_image([{"image": image} for image in images])
        return ImageBatch(batch.tensor, batch.image_sizes)

    def features(self, batch: ImageBatch) -> Features:
        """Return (N, C, h, w) levels by name, in fp32 as anchors and boxes take their dtype."""
        return {name: level.float() for name, level in self.backbone(batch.tensor).items()}

    def detect(
        self, boxes: Tensor, output: RegionOutput, class_probs: Tensor, size: tuple[int, int]
    ) -> Detections:
        """Detect in (R, 4) regions, maybe none, of (R, K + 1) class_probs, as the host does."""
        # The predictor takes logits, of which the logarithm of probabilities is one version.
        logits = class_probs.clamp(min=torch.finfo(class_probs.dtype).tiny).log()
        deltas = output.deltas.flatten(1)
        (result,), (kept,) = self.roi_heads.box_predictor.inference(
            (logits, deltas), [Instances(size, proposal_boxes=Boxes(boxes))]
        )
        # Detectron2 counts kept rows after dropping those that are not finite.
        finite = deltas.isfinite().all(1) & class_probs.isfinite().all(1)
        rows = finite.argsort(descending=True, stable=True)[kept]
        detections = Detections(
            result.pred_boxes.tensor,
            result.scores,
            result.pred_classes,
            class_probs[rows],
            output.embeddings[rows],
        )
        # Boxes clipped to nothing, which Detectron2 drops after inference, would be poison as
        # targets.
        return detections[result.pred_boxes.nonempty()]

    def propose(
        self, features: Features, batch: ImageBatch, targets: list[Targets] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return (P_i, 4) proposals of each image and, of (M_i,) targets in train mode, losses."""
        instances = targets and [
            Instances(size, gt_boxes=Boxes(t.boxes), gt_weights=t.weights)
            for size, t in zip(batch.sizes, targets, strict=True)
        ]
        images = ImageList(batch.tensor, batch.sizes)
        proposals, losses = self.proposal_generator(images, features, instances)
        return [p.proposal_boxes.tensor for p in proposals], losses

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], targets: list[Targets]) -> RegionSamples:
        """Draw R regions of (P_i, 4) proposals and (M_i,) targets' boxes as `ROIHeads` does."""
        # Sampling uses no image size; it carries `gt_*` fields along, here the row of the target.
        size = (0, 0)
        pool = [
            Instances(size, proposal_boxes=Boxes(p), objectness_logits=p.new_zeros(len(p)))
            for p in proposals
        ]
        truth = [
            Instances(
                size,
                gt_boxes=Boxes(t.boxes),
                gt_classes=t.classes,
                gt_index=torch.arange(len(t), device=t.boxes.device),
            )
            for t in targets
        ]
        heads = self.roi_heads
        matcher = heads.proposal_matcher
        try:
            # Called once an image, in order: a matcher is not told whose overlaps it is given.
            weights = iter([target.weights for target in targets])
            heads.proposal_matcher = lambda overlaps: _match_weighted_first(
                matcher,
                overlaps,
                next(weights),
                int(heads.batch_size_per_image * heads.positive_fraction),
            )
            sampled = heads.label_and_sample_proposals(pool, truth)
        finally:
            heads.proposal_matcher = matcher
        return RegionSamples.from_matches(
            [s.proposal_boxes.tensor for s in sampled],
            [s.gt_classes for s in sampled],
            # An image without boxes has no such field.
            [s.gt_index if s.has("gt_index") else torch.zeros_like(s.gt_classes) for s in sampled],
            targets,
            self.num_classes,
        )

    def score_regions(
        self, features: Features, boxes: list[Tensor], stride_shift: int = 0
    ) -> RegionOutput:
        """Pool and score R = sum(R_i) regions, (R_i, 4) of each image; R = 0 is allowed."""
        heads = self.roi_heads
        pooler, names = heads.box_pooler, heads.box_in_features
        if stride_shift:
            pooler = copy.deepcopy(pooler)
            pooler.level_poolers = pooler.level_poolers[stride_shift:]
            pooler.min_level += stride_shift
            names = names[:-stride_shift]
        pooled = pooler([features[name] for name in names], [Boxes(b) for b in boxes])
        embeddings = heads.box_head(pooled)
        logits, deltas = heads.box_predictor(embeddings)
        deltas = deltas.float().reshape(len(deltas), deltas.shape[1] // 4, 4)
        return RegionOutput(logits.float(), deltas, embeddings.float())

    def levels(self, boxes: list[Tensor]) -> Tensor:
        """Return (R,) levels of (R_i, 4) regions of each image, assigned as the pooler does."""
        pooler = self.roi_heads.box_pooler
        first, last = pooler.min_level, pooler.max_level
        canonical = (pooler.canonical_box_size, pooler.canonical_level)
        return first + assign_boxes_to_levels([Boxes(b) for b in boxes], first, last, *canonical)

    def encode(self, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        """Return the (R, 4) deltas from (R, 4) boxes to (R, 4) others, none of them empty."""
        return self.roi_heads.box_predictor.box2box_transform.get_deltas(boxes, gt_boxes)

    def decode(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Apply (R, K or 1, 4) deltas to (R, 4) boxes, giving (R, K or 1, 4) boxes."""
        transform = self.roi_heads.box_predictor.box2box_transform
        return transform.apply_deltas(deltas.flatten(1), boxes).reshape(deltas.shape)

    @property
    def score_floor(self) -> float:
        """Detections have a higher score."""
        return self.roi_heads.box_predictor.test_score_thresh

    @score_floor.setter
    def score_floor(self, floor: float) -> None:
        self.roi_heads.box_predictor.test_score_thresh = floor

    @property
    def classifier(self) -> nn.Linear:
        """The layer from D to K + 1, background last."""
        return self.roi_heads.box_predictor.cls_score


def _check_supported(model: GeneralizedRCNN) -> None:
    heads, rpn = model.roi_heads, model.proposal_generator
    found = None
    if type(heads) is not StandardROIHeads:
        found = f"MODEL.ROI_HEADS.NAME {type(heads).__name__}"
    elif heads.mask_on or heads.keypoint_on:
        found = "MODEL.MASK_ON or MODEL.KEYPOINT_ON"
    elif type(heads.box_predictor) is not FastRCNNOutputLayers:
        found = f"a box predictor of type {type(heads.box_predictor).__name__}"
    elif heads.box_predictor.use_sigmoid_ce:
        found = "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"
    elif heads.box_predictor.box_reg_loss_type != "smooth_l1":
        found = f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE {heads.box_predictor.box_reg_loss_type}"
    elif heads.train_on_pred_boxes:
        found = "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES"
    elif not isinstance(rpn, IgnoringRPN):
        found = f"MODEL.PROPOSAL_GENERATOR.NAME {type(rpn).__name__}"
    elif rpn.anchor_generator.box_dim != 4:
        found = f"MODEL.ANCHOR_GENERATOR.NAME {type(rpn.anchor_generator).__name__}"
    if found:
        raise _not_supported(found)


def _not_supported(found: str) -> InputError:
    return InputError(
        f"{found} is not supported; supported are an FPN backbone, IgnoringRPN as proposal "
        "generator, and StandardROIHeads with a box head only (no masks, keypoints, cascade or "
        "C4), softmax classification and smooth L1 box loss"
    )
