"""Detectron2's config with the keys of this project, and its scaling to a number of GPUs."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from ssod.config import add_detectron2_config, add_ssod_config
from ssod.errors import InputError

LEVELS = ["p2", "p3", "p4", "p5"]
_ONLY_VALUE = {  # of keys of Detectron2 that this host does not implement otherwise
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.CROP.ENABLED": False,
    "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
    "DATALOADER.ASPECT_RATIO_GROUPING": True,
    "VIS_PERIOD": 0,
    "TEST.AUG.ENABLED": False,
    "TEST.PRECISE_BN.ENABLED": False,
    "DATASETS.PROPOSAL_FILES_TRAIN": (),
    "MODEL.LOAD_PROPOSALS": False,
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
    model.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    for key, value in _ONLY_VALUE.items():
        found = cfg
        for part in key.split("."):
            found = found[part]
        if found != value:
            raise InputError(f"{key} must be {value!r}, got {found!r}: nothing else is supported")
    for key, known in (
        ("EVAL_MODEL", ("teacher", "student")),
        ("AMP_DTYPE", ("float16", "bfloat16")),
    ):
        if cfg.SSOD[key] not in known:
            raise InputError(f"SSOD.{key} must be one of {list(known)}, got {cfg.SSOD[key]!r}")
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise InputError(
            f"SOLVER.CHECKPOINT_PERIOD must be at least 1, got {cfg.SOLVER.CHECKPOINT_PERIOD}"
        )
    try:
        torch.empty(1, device=cfg.MODEL.DEVICE)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} cannot be used here; set it to cpu"
        ) from error


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """
    Return the config for another number of processes than `SOLVER.REFERENCE_WORLD_SIZE`.

    Detectron2's linear scaling (`DefaultTrainer.auto_scale_workers`: batch and learning rate up,
    schedule down) is applied to the unlabeled batch and the burn-in as well, and the EMA keeps its
    length in images: decay ** scale (https://arxiv.org/abs/2307.13813). With a reference of 0
    nothing changes.

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
    ssod.EMA_DECAY = ssod.EMA_DECAY**factor
    if frozen:
        scaled.freeze()
    return scaled
