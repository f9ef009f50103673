"""Detectron2's config with the keys of this project, and its scaling to a number of GPUs."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from ssod.core.distributed import get_world_size
from ssod.errors import InputError
from ssod.keys import add_detectron2_config, add_ssod_config

LEVELS = ["p2", "p3", "p4", "p5"]
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # values; what else Detectron2 has is not implemented
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("TeacherStudentRCNN",),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign", "ROIPool"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.CROP.ENABLED": (False,),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    "DATALOADER.ASPECT_RATIO_GROUPING": (True,),
    # Detectron2's third, WarmupStepWithFixedGammaLR, fails after the last iteration of a training.
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "TEST.AUG.ENABLED": (False,),
    "TEST.PRECISE_BN.ENABLED": (False,),
    "VIS_PERIOD": (0,),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "SSOD.EVAL_MODEL": ("teacher", "student"),
}


def get_config() -> CfgNode:
    """
    Return Detectron2's defaults with `SSOD.*`, for a Faster R-CNN with an FPN.

    Detectron2's own defaults are those of a C4 model, which is not supported. `SEED` is 0, where
    its -1 means a random one: every run is reproducible. `MODEL.DEVICE` is cuda where there is one.
    """
    cfg = get_cfg()
    add_ssod_config(cfg)
    add_detectron2_config(cfg)
    cfg.SSOD.HOST = "detectron2"
    cfg.SEED = 0
    model = cfg.MODEL
    model.DEVICE = DEFAULT_DEVICE
    model.META_ARCHITECTURE = "TeacherStudentRCNN"
    model.BACKBONE.NAME = "build_resnet_fpn_backbone"
    model.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    model.PROPOSAL_GENERATOR.NAME = "IgnoringRPN"
    model.RPN.IN_FEATURES = [*LEVELS, "p6"]
    model.RPN.PRE_NMS_TOPK_TRAIN = 2000
    model.RPN.PRE_NMS_TOPK_TEST = 1000
    model.RPN.POST_NMS_TOPK_TRAIN = 1000
    model.RPN.POST_NMS_TOPK_TEST = 1000
    model.ROI_HEADS.NAME = "StandardROIHeads"
    model.ROI_HEADS.IN_FEATURES = LEVELS
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC = 2
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.DATASETS.TRAIN = ()
    cfg.DATASETS.TEST = ()
    return cfg


def check_config(cfg: CfgNode) -> None:
    """
    Refuse what this host would otherwise leave out in silence.

    Raises:
        InputError: for a key of Detectron2 with a value that is not implemented here, or a
            device that cannot be used.
    """
    for key, values in _SUPPORTED.items():
        found = functools.reduce(lambda group, name: group[name], key.split("."), cfg)
        if found not in values:
            known = " or ".join(repr(value) for value in values)
            raise InputError(f"{key} must be {known}, got {found!r}: nothing else is supported")
    _check_solver(cfg)
    device = cfg.MODEL.DEVICE
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not device.startswith("cuda"):
        raise InputError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE needs a GPU: Detectron2 has no gradient of "
            f"deformable convolutions on MODEL.DEVICE {device!r}"
        )
    if get_world_size() > 1 and device != DEFAULT_DEVICE:
        raise InputError(
            f"MODEL.DEVICE must be {DEFAULT_DEVICE!r} for several processes here, got {device!r}"
        )


def _check_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if solver.CHECKPOINT_PERIOD < 1:
        raise InputError(
            f"SOLVER.CHECKPOINT_PERIOD must be at least 1, got {solver.CHECKPOINT_PERIOD}"
        )
    if solver.NESTEROV and (cfg.SSOD.OPTIMIZER != "SGD" or not solver.MOMENTUM):
        raise InputError(
            "SOLVER.NESTEROV True needs SSOD.OPTIMIZER SGD and a SOLVER.MOMENTUM above 0, got "
            f"{cfg.SSOD.OPTIMIZER} and {solver.MOMENTUM}"
        )


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """
    Return the config for another number of processes than `SOLVER.REFERENCE_WORLD_SIZE`.

    Detectron2's linear scaling (`DefaultTrainer.auto_scale_workers`: batch and learning rate up,
    schedule down) is applied to the unlabeled batch, the burn-in, and the iteration counts of
    filters and methods as well, and the EMAs of teacher and filter keep their length in images:
    decay ** scale (https://arxiv.org/abs/2307.13813). `SSOD.EMA_GAMMA` stays: it weighs students by
    their share of the training so far. With a reference of 0 nothing changes.

    Raises:
        InputError: if a batch is not a multiple of the reference.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    for key, batch in (
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH),
        ("SSOD.DATA.UNLABELED_PER_BATCH", cfg.SSOD.DATA.UNLABELED_PER_BATCH),
    ):
        if batch % reference:
            raise InputError(
                f"{key} must be a multiple of SOLVER.REFERENCE_WORLD_SIZE {reference} to be scaled "
                f"to {world_size} processes, got {batch}"
            )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    frozen = scaled.is_frozen()
    scaled.defrost()
    factor = world_size / reference
    ssod = scaled.SSOD
    ssod.DATA.UNLABELED_PER_BATCH = ssod.DATA.UNLABELED_PER_BATCH // reference * world_size
    ssod.BURN_IN_ITERS = round(ssod.BURN_IN_ITERS / factor)
    for group, key in ((ssod.DASO, "DELAY"), (ssod.CONTRASTIVE, "RAMP_ITERS")):
        group[key] = round(group[key] / factor)
    for group, key in ((ssod.FILTER, "REFRESH_PERIOD"), (ssod.DASO, "WINDOW")):
        group[key] = max(round(group[key] / factor), min(group[key], 1))  # 0 stays refused
    for group in (ssod, ssod.FILTER):
        # A negative one, which is refused later, would become complex.
        group.EMA_DECAY = math.copysign(abs(group.EMA_DECAY) ** factor, group.EMA_DECAY)
    if frozen:
        scaled.freeze()
    return scaled
