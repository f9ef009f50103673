"""From a config to a torchvision detector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from ssod.errors import InputError
from ssod.hosts.torchvision.adapter import TorchvisionRCNN

RESNETS = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
}


def _choose(options: dict, key: str, value: object) -> object:
    if value not in options:
        raise InputError(f"{key} must be one of {list(options)}, got {value!r}")
    return options[value]


def build_backbone(cfg: CfgNode) -> BackboneWithFPN:
    """
    Build a randomly initialised ResNet-FPN: levels "0" to "3" and "pool", strides 4 to 64.

    Raises:
        InputError: for a depth or norm that is not supported.
    """
    norm = _choose(NORMS, "MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM)
    body = _choose(RESNETS, "MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH)(norm_layer=norm)
    width = body.inplanes // 8
    return BackboneWithFPN(
        body,
        return_layers={f"layer{i + 1}": str(i) for i in range(4)},
        in_channels_list=[width * 2**i for i in range(4)],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm_layer=_choose({"": None} | NORMS, "MODEL.FPN.NORM", cfg.MODEL.FPN.NORM),
    )


def build_detector(cfg: CfgNode) -> TorchvisionRCNN:
    """Build a Faster R-CNN from the keys that share their names with Detectron2's."""
    model, channels = cfg.MODEL, cfg.MODEL.FPN.OUT_CHANNELS
    rpn, heads, box_head = model.RPN, model.ROI_HEADS, model.ROI_BOX_HEAD
    sizes = tuple(tuple(level) for level in model.ANCHOR_GENERATOR.SIZES)
    if len(sizes) != 5:
        raise InputError(
            f"MODEL.ANCHOR_GENERATOR.SIZES needs one list for each of the 5 pyramid levels, "
            f"got {len(sizes)}"
        )
    ratios = (tuple(model.ANCHOR_GENERATOR.ASPECT_RATIOS[0]),) * len(sizes)
    resolution = box_head.POOLER_RESOLUTION
    return TorchvisionRCNN(
        build_backbone(cfg),
        heads.NUM_CLASSES,
        rpn_ignore_weight=cfg.SSOD.RPN_IGNORE_WEIGHT,
        focal_gamma=cfg.SSOD.FOCAL_GAMMA,
        rpn_anchor_generator=AnchorGenerator(sizes, ratios),
        rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOPK_TRAIN,
        rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOPK_TEST,
        rpn_post_nms_top_n_train=rpn.POST_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_test=rpn.POST_NMS_TOPK_TEST,
        rpn_nms_thresh=rpn.NMS_THRESH,
        rpn_bg_iou_thresh=rpn.IOU_THRESHOLDS[0],
        rpn_fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
        rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        rpn_positive_fraction=rpn.POSITIVE_FRACTION,
        box_roi_pool=MultiScaleRoIAlign(
            ["0", "1", "2", "3"], resolution, box_head.POOLER_SAMPLING_RATIO
        ),
        box_head=TwoMLPHead(channels * resolution**2, box_head.FC_DIM),
        box_predictor=FastRCNNPredictor(box_head.FC_DIM, heads.NUM_CLASSES + 1),
        box_score_thresh=heads.SCORE_THRESH_TEST,
        box_nms_thresh=heads.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_fg_iou_thresh=heads.IOU_THRESHOLDS[0],
        box_bg_iou_thresh=heads.IOU_THRESHOLDS[0],
        box_batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        box_positive_fraction=heads.POSITIVE_FRACTION,
    )
