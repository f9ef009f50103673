"""Defaults of the keys the torchvision host honours; names and meanings are Detectron2's."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from ssod.keys import add_ssod_config


def get_config() -> CfgNode:
    """Return the defaults, `SSOD.*` included. Where a default is not Detectron2's, it says why."""
    cfg = CfgNode()
    cfg.VERSION = 2
    cfg.OUTPUT_DIR = "./output"
    # Detectron2's -1 means a random seed; here every run is reproducible.
    cfg.SEED = 0

    cfg.MODEL = _model()
    cfg.INPUT = CfgNode(
        {
            # Of the shorter side: one of these, "choice", or from the first to the second, "range".
            "MIN_SIZE_TRAIN": (800,),
            "MIN_SIZE_TRAIN_SAMPLING": "choice",
            "MAX_SIZE_TRAIN": 1333,
            "MIN_SIZE_TEST": 800,
            "MAX_SIZE_TEST": 1333,
            # "horizontal" or "none".
            "RANDOM_FLIP": "horizontal",
        }
    )
    cfg.DATALOADER = CfgNode({"NUM_WORKERS": 4})
    solver = cfg.SOLVER = CfgNode(
        {
            "IMS_PER_BATCH": 16,
            "BASE_LR": 0.001,
            "MOMENTUM": 0.9,
            "WEIGHT_DECAY": 0.0001,
            "WEIGHT_DECAY_NORM": 0.0,
            "MAX_ITER": 40000,
            "STEPS": (30000,),
            "GAMMA": 0.1,
            "WARMUP_ITERS": 1000,
            "WARMUP_FACTOR": 0.001,
            "CHECKPOINT_PERIOD": 5000,
        }
    )
    # Detectron2's default is to clip each element, "value".
    solver.CLIP_GRADIENTS = CfgNode(
        {"ENABLED": False, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0}
    )
    solver.AMP = CfgNode({"ENABLED": False})
    # Iterations between evaluations, 0: at the end only.
    cfg.TEST = CfgNode({"EVAL_PERIOD": 0, "DETECTIONS_PER_IMAGE": 100})
    add_ssod_config(cfg)
    cfg.SSOD.AMP_DTYPE = "bfloat16"  # needs no loss scaling, and works on CPUs
    return cfg


def _model() -> CfgNode:
    model = CfgNode()
    # "auto": cuda where there is one. Detectron2's default is "cuda".
    model.DEVICE = "auto"
    # Checkpoint of this project, or a state dict of torchvision's FasterRCNN. "": from scratch.
    model.WEIGHTS = ""
    model.RESNETS = CfgNode(
        # BN because nothing is pretrained; Detectron2's FrozenBN does not learn from scratch.
        {"DEPTH": 50, "NORM": "BN", "RES2_OUT_CHANNELS": 256}
    )
    model.FPN = CfgNode({"OUT_CHANNELS": 256, "NORM": ""})
    model.ANCHOR_GENERATOR = CfgNode(
        {"SIZES": [[32], [64], [128], [256], [512]], "ASPECT_RATIOS": [[0.5, 1.0, 2.0]]}
    )
    model.RPN = CfgNode(
        {
            "IOU_THRESHOLDS": [0.3, 0.7],
            "BATCH_SIZE_PER_IMAGE": 256,
            "POSITIVE_FRACTION": 0.5,
            # Detectron2's FPN configs, not its C4 defaults.
            "PRE_NMS_TOPK_TRAIN": 2000,
            "PRE_NMS_TOPK_TEST": 1000,
            "POST_NMS_TOPK_TRAIN": 1000,
            "POST_NMS_TOPK_TEST": 1000,
            "NMS_THRESH": 0.7,
        }
    )
    model.ROI_HEADS = CfgNode(
        {
            "NUM_CLASSES": 80,
            "BATCH_SIZE_PER_IMAGE": 512,
            "POSITIVE_FRACTION": 0.25,
            "IOU_THRESHOLDS": [0.5],
            "SCORE_THRESH_TEST": 0.05,
            "NMS_THRESH_TEST": 0.5,
        }
    )
    # A sampling ratio of 2 is torchvision's; 0 (adaptive) is Detectron2's.
    model.ROI_BOX_HEAD = CfgNode(
        {"FC_DIM": 1024, "POOLER_RESOLUTION": 7, "POOLER_SAMPLING_RATIO": 2}
    )
    return model
