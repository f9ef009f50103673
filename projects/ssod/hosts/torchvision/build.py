"""From a config to a model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError
from ssod.hosts import optimizer
from ssod.hosts.build import teacher_student_arguments
from ssod.hosts.torchvision.adapter import TorchvisionRCNN

RESNETS = {  # block, blocks of each stage
    18: (resnet.BasicBlock, (2, 2, 2, 2)),
    34: (resnet.BasicBlock, (3, 4, 6, 3)),
    50: (resnet.Bottleneck, (3, 4, 6, 3)),
}
GN_GROUPS = 32  # as in Detectron2
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, GN_GROUPS),
}


def _choose(options: dict, key: str, value: object) -> object:
    if value not in options:
        raise InputError(f"{key} must be one of {list(options)}, got {value!r}")
    return options[value]


class _ResNet(resnet.ResNet):
    """torchvision's ResNet, with the width of its stages to choose; its own is 64."""

    def __init__(self, block: type, stages: tuple[int, ...], width: int, norm: Callable):
        self.width = width
        super().__init__(block, stages, norm_layer=norm)

    def _make_layer(self, block: type, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


def build_backbone(cfg: CfgNode) -> BackboneWithFPN:
    """
    Build a randomly initialised ResNet-FPN: levels "0" to "3" and "pool", strides 4 to 64.

    Raises:
        InputError: for a depth or norm that is not supported.
    """
    norm = _choose(NORMS, "MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM)
    block, stages = _choose(RESNETS, "MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH)
    channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    if not 0 < channels <= 64 * block.expansion or channels % block.expansion:
        raise InputError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS of R-{cfg.MODEL.RESNETS.DEPTH} must be a multiple of "
            f"{block.expansion} up to {64 * block.expansion}, the published width, got {channels}"
        )
    for key, width in (
        ("RESNETS", channels // block.expansion),
        ("FPN", cfg.MODEL.FPN.OUT_CHANNELS),
    ):
        if cfg.MODEL[key].NORM == "GN" and width % GN_GROUPS:
            raise InputError(
                f"MODEL.{key}.NORM GN needs channels in multiples of {GN_GROUPS}, got {width}"
            )
    return BackboneWithFPN(
        _ResNet(block, stages, channels // block.expansion, norm),
        return_layers={f"layer{i + 1}": str(i) for i in range(4)},
        in_channels_list=[channels * 2**i for i in range(4)],
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
    ratios = tuple(tuple(level) for level in model.ANCHOR_GENERATOR.ASPECT_RATIOS)
    if len(ratios) not in (1, len(sizes)):
        raise InputError(
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS needs one list, or one for each of the 5 "
            f"pyramid levels, got {len(ratios)}"
        )
    ratios = ratios * (len(sizes) // len(ratios))
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
            ["0", "1", "2", "3"],
            resolution,
            box_head.POOLER_SAMPLING_RATIO,
            canonical_scale=cfg.SSOD.CANONICAL_BOX_SIZE,
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


def build_model(cfg: CfgNode) -> TeacherStudent:
    """Build student, teacher, filter and methods on the CPU, with random weights of `SEED`."""
    torch.manual_seed(cfg.SEED)
    detector = build_detector(cfg)
    return TeacherStudent(detector, **teacher_student_arguments(cfg, detector))


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build `SSOD.OPTIMIZER` over what is trainable; norms decay by `WEIGHT_DECAY_NORM`."""
    norms, others = [], []
    for module in model.modules():
        group = norms if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) else others
        group += [p for p in module.parameters(recurse=False) if p.requires_grad]
    groups = [
        {"params": others, "weight_decay": cfg.SOLVER.WEIGHT_DECAY},
        {"params": norms, "weight_decay": cfg.SOLVER.WEIGHT_DECAY_NORM},
    ]
    return optimizer.build_optimizer(cfg, groups)
