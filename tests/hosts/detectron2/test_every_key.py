"""Every key that this host takes from Detectron2 has an effect, is refused, or cannot have one."""

import json
import re
import shutil
import sys
from functools import cache

import pytest
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from ssod.cli.train import main
from ssod.config import _leaves
from ssod.errors import InputError
from ssod.hosts.detectron2.defaults import get_config, scale_to_world_size
from ssod.hosts.detectron2.run import Run
from ssod.hosts.metric_log import read_metrics
from tiny_detectron2 import CHANGES, tiny_config
from tiny_run import OPTIONS, data_options, differences

TRAIN_SET = "every_key_train"  # the labeled images of `shapes`, some without boxes
# A slim ResNet-50, as ResNet-18 leaves some keys out, and a schedule where each iteration differs.
SHORT = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 8,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.STEPS": [2],
    "SSOD.BURN_IN_ITERS": 1,
    "SSOD.LOG_PERIOD": 1,
}
COSINE = ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")
NUM_CONV = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1)
CLIP = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
DEFORM = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True])
CATALOG = ("DATASETS.TRAIN", [TRAIN_SET], "SSOD.DATA.LABELED_JSON", "")

# Another value, and what both runs need besides: the result must differ.
CHANGING = {
    "MODEL.PIXEL_MEAN": ([0.0, 0.0, 0.0],),
    "MODEL.PIXEL_STD": ([2.0, 2.0, 2.0],),
    "MODEL.BACKBONE.NAME": ("build_retinanet_resnet_fpn_backbone",),
    "MODEL.BACKBONE.FREEZE_AT": (2,),
    "MODEL.FPN.OUT_CHANNELS": (16,),
    "MODEL.FPN.NORM": ("BN",),
    "MODEL.FPN.FUSE_TYPE": ("avg",),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (20,),
    "MODEL.ANCHOR_GENERATOR.SIZES": ([[12], [16], [24], [32], [48]],),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ([[1.0]],),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0.5,),
    "MODEL.RPN.IN_FEATURES": (["p2", "p3", "p4", "p5", "p5"],),
    "MODEL.RPN.BOUNDARY_THRESH": (0,),
    "MODEL.RPN.IOU_THRESHOLDS": ([0.1, 0.4],),
    "MODEL.RPN.IOU_LABELS": ([0, 0, 1],),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": (8,),
    "MODEL.RPN.POSITIVE_FRACTION": (0.01,),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("giou",),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": (2.0,),
    "MODEL.RPN.BBOX_REG_WEIGHTS": ((2.0, 2.0, 1.0, 1.0),),
    "MODEL.RPN.SMOOTH_L1_BETA": (1.0,),
    "MODEL.RPN.LOSS_WEIGHT": (2.0,),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": (5,),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": (5,),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": (5,),
    "MODEL.RPN.POST_NMS_TOPK_TEST": (5,),
    "MODEL.RPN.NMS_THRESH": (0.1,),
    "MODEL.RPN.CONV_DIMS": ([8, 4],),
    "MODEL.ROI_HEADS.IN_FEATURES": (["p3", "p4", "p5"],),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": ([0.1],),
    "MODEL.ROI_HEADS.IOU_LABELS": ([-1, 1],),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": (8,),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": (0.1,),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": (0.2,),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": (0.1,),
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": (False,),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": (2.0,),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": ((5.0, 5.0, 5.0, 5.0),),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": (1.0,),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": (5,),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (1,),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlign",),
    "MODEL.ROI_BOX_HEAD.NUM_FC": (1,),
    "MODEL.ROI_BOX_HEAD.FC_DIM": (16,),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": (1,),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": (4, *NUM_CONV),
    "MODEL.ROI_BOX_HEAD.NORM": ("BN", *NUM_CONV),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (True,),
    "MODEL.RESNETS.DEPTH": (101,),
    "MODEL.RESNETS.NUM_GROUPS": (2,),
    "MODEL.RESNETS.NORM": ("FrozenBN",),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (8,),
    "MODEL.RESNETS.STRIDE_IN_1X1": (False,),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (8,),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (4,),
    "INPUT.MIN_SIZE_TRAIN": ([56],),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("range", "INPUT.MIN_SIZE_TRAIN", [48, 64]),
    "INPUT.MAX_SIZE_TRAIN": (56,),
    "INPUT.MIN_SIZE_TEST": (48,),
    "INPUT.MAX_SIZE_TEST": (48,),
    "INPUT.RANDOM_FLIP": ("none",),
    "INPUT.FORMAT": ("RGB",),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": (False, *CATALOG),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupCosineLR",),
    "SOLVER.MAX_ITER": (2, "SOLVER.STEPS", []),
    "SOLVER.BASE_LR": (0.02,),
    "SOLVER.BASE_LR_END": (0.005, *COSINE),
    "SOLVER.MOMENTUM": (0.5,),
    "SOLVER.NESTEROV": (True,),
    "SOLVER.WEIGHT_DECAY": (0.1,),
    "SOLVER.WEIGHT_DECAY_NORM": (0.1,),
    "SOLVER.GAMMA": (0.5,),
    "SOLVER.STEPS": ([],),
    "SOLVER.WARMUP_FACTOR": (0.5,),
    "SOLVER.WARMUP_ITERS": (0,),
    "SOLVER.WARMUP_METHOD": ("constant",),
    "SOLVER.RESCALE_INTERVAL": (True, *COSINE),
    "SOLVER.CHECKPOINT_PERIOD": (1,),
    "SOLVER.IMS_PER_BATCH": (4,),
    "SOLVER.REFERENCE_WORLD_SIZE": (2,),
    "SOLVER.BIAS_LR_FACTOR": (2.0,),
    "SOLVER.WEIGHT_DECAY_BIAS": (0.1,),
    "SOLVER.CLIP_GRADIENTS.ENABLED": (True, *CLIP[2:]),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", *CLIP),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (0.1, *CLIP),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (1.0, *CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
    "SOLVER.AMP.ENABLED": (True,),
    "TEST.EVAL_PERIOD": (1,),
    "TEST.DETECTIONS_PER_IMAGE": (2,),
    "SEED": (1,),
}
# The same of layers that only a GPU can train: the shapes of the parameters must differ.
CHANGING_SHAPES = {
    "MODEL.RESNETS.DEFORM_MODULATED": (True, *DEFORM),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": (2, *DEFORM),
}
# A value that is not supported, or names what does not exist, and what the error says of it.
REFUSED = {
    "VERSION": (1, "VERSION must be 2"),
    "MODEL.LOAD_PROPOSALS": (True, "MODEL.LOAD_PROPOSALS must be False"),
    "MODEL.MASK_ON": (True, "MODEL.MASK_ON"),
    "MODEL.KEYPOINT_ON": (True, "MODEL.KEYPOINT_ON"),
    "MODEL.DEVICE": ("cuda:99", "MODEL.DEVICE"),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "MODEL.META_ARCHITECTURE must be"),
    "MODEL.WEIGHTS": ("nowhere.pth", "nowhere.pth"),
    "MODEL.FPN.IN_FEATURES": (["res3", "res4", "res5"], "p2"),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN", "MODEL.PROPOSAL_GENERATOR.NAME RPN"),
    "MODEL.ANCHOR_GENERATOR.NAME": ("RotatedAnchorGenerator", "MODEL.ANCHOR_GENERATOR.NAME"),
    "MODEL.RPN.HEAD_NAME": ("NoHead", "NoHead"),
    "MODEL.ROI_HEADS.NAME": ("CascadeROIHeads", "MODEL.ROI_HEADS.NAME"),
    "MODEL.ROI_HEADS.NUM_CLASSES": (7, "MODEL.ROI_HEADS.NUM_CLASSES is 7"),
    "MODEL.ROI_BOX_HEAD.NAME": ("NoHead", "NoHead"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("giou", "BBOX_REG_LOSS_TYPE giou"),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (True, "TRAIN_ON_PRED_BOXES"),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (True, "federated loss"),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (True, "USE_SIGMOID_CE"),
    "MODEL.RESNETS.OUT_FEATURES": (["res3", "res4", "res5"], "res2"),
    "MODEL.RESNETS.RES5_DILATION": (2, "not log2 contiguous"),
    DEFORM[0]: (DEFORM[1], "DEFORM_ON_PER_STAGE needs a GPU"),
    "INPUT.CROP.ENABLED": (True, "INPUT.CROP.ENABLED must be False"),
    "DATASETS.TRAIN": ([TRAIN_SET], "DATASETS.TRAIN and SSOD.DATA.LABELED_JSON both name"),
    "DATASETS.TEST": ([TRAIN_SET], "DATASETS.TEST and SSOD.DATA.VAL_JSON both name"),
    "DATALOADER.ASPECT_RATIO_GROUPING": (False, "DATALOADER.ASPECT_RATIO_GROUPING must be"),
    "DATALOADER.SAMPLER_TRAIN": ("RandomSubsetTrainingSampler", "DATALOADER.SAMPLER_TRAIN must"),
    "TEST.AUG.ENABLED": (True, "TEST.AUG.ENABLED must be False"),
    "TEST.PRECISE_BN.ENABLED": (True, "TEST.PRECISE_BN.ENABLED must be False"),
    "VIS_PERIOD": (1, "VIS_PERIOD must be 0"),
}
# Why the result cannot differ, and keys or, with a dot at the end, whole groups.
INDIFFERENT = {
    "of architectures that are refused": """
        MODEL.ROI_BOX_CASCADE_HEAD. MODEL.SEM_SEG_HEAD. MODEL.PANOPTIC_FPN. MODEL.RETINANET.
        MODEL.ANCHOR_GENERATOR.ANGLES""",
    "of MODEL.MASK_ON and MODEL.KEYPOINT_ON, which are refused": """
        MODEL.ROI_MASK_HEAD. MODEL.ROI_KEYPOINT_HEAD. INPUT.MASK_FORMAT TEST.KEYPOINT_OKS_SIGMAS""",
    "of MODEL.LOAD_PROPOSALS, which is refused": """
        DATASETS.PROPOSAL_FILES_TRAIN DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN
        DATASETS.PROPOSAL_FILES_TEST DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST""",
    "of MODEL.ROI_BOX_HEAD.USE_FED_LOSS, which is refused": """
        MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES""",
    "of INPUT.CROP.ENABLED, which is refused": "INPUT.CROP.TYPE INPUT.CROP.SIZE",
    "of RepeatFactorTrainingSampler, which DATALOADER.SAMPLER_TRAIN refuses": """
        DATALOADER.REPEAT_THRESHOLD DATALOADER.REPEAT_SQRT""",
    "of WarmupStepWithFixedGammaLR, which is refused": "SOLVER.NUM_DECAYS",
    "of TEST.AUG.ENABLED, which is refused": "TEST.AUG.MIN_SIZES TEST.AUG.MAX_SIZE TEST.AUG.FLIP",
    "of TEST.PRECISE_BN.ENABLED, which is refused": "TEST.PRECISE_BN.NUM_ITER",
    "time alone: no draw depends on the workers": "DATALOADER.NUM_WORKERS",
    "for users' own code: nothing in Detectron2 reads it": "GLOBAL.HACK",
}
# Of the process rather than of a run: `test_keys_of_the_process_are_honoured`.
OF_THE_PROCESS = {"OUTPUT_DIR", "CUDNN_BENCHMARK", "FLOAT32_PRECISION", "TEST.EXPECTED_RESULTS"}
TIMES = {"time", "data_time", "eta_seconds", "rank_data_time"}


def _config(shapes, output, *overrides):
    return tiny_config(shapes, output, *sum(SHORT.items(), ()), *overrides)


def _register(shapes, path):
    content = json.loads((shapes / "annotations" / "labeled.json").read_text())
    bare = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != bare]
    path.write_text(json.dumps(content))
    register_coco_instances(TRAIN_SET, {}, str(path), str(shapes / "images"))


@pytest.fixture(scope="module")
def result(shapes, tmp_path_factory):
    """Train; returns all that a run leaves but times and configs. Equal calls train once."""
    _register(shapes, tmp_path_factory.mktemp("catalog") / "train.json")

    @cache  # of texts, as lists cannot be hashed
    def result(*overrides):
        output = tmp_path_factory.mktemp("every_key")
        run = Run(scale_to_world_size(_config(shapes, output, *overrides), 1))
        run.train()
        lines = read_metrics(output)
        found = {
            "log": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
            "weights": run.model.state_dict(),
            "predictions": [p.read_text() for p in sorted(output.rglob("coco_*.json"))],
            "checkpoints": sorted(p.name for p in output.glob("*.pth")),
        }
        shutil.rmtree(output)
        return found

    return lambda *items: result(*(i if isinstance(i, str) else json.dumps(i) for i in items))


KEYS = sorted(key for key, _ in _leaves(get_config()) if not key.startswith("SSOD."))


def _indifferent_keys():
    names = " ".join(INDIFFERENT.values()).split()
    found = [[k for k in KEYS if k.startswith(n) and (n[-1] == "." or k == n)] for n in names]
    assert all(found), f"one of these is no key: {names}"
    return [key for keys in found for key in keys]


def test_every_key_is_in_one_table():
    tables = (CHANGING, CHANGING_SHAPES, REFUSED, OF_THE_PROCESS, _indifferent_keys())
    listed = sorted(key for table in tables for key in table)
    assert listed == KEYS, "say in a table above what another value of a key must do"


@pytest.mark.parametrize("key", CHANGING)
def test_another_value_gives_another_result(result, key):
    value, *needs = CHANGING[key]
    assert differences(result(*needs, key, value), result(*needs)), f"nothing reads {key}"


@pytest.mark.parametrize("key", CHANGING_SHAPES)
def test_another_value_gives_another_model(shapes, tmp_path, key):
    value, *needs = CHANGING_SHAPES[key]
    configs = (_config(shapes, tmp_path, *needs, *more) for more in ((), (key, value)))
    before, after = ([p.shape for p in build_model(cfg).parameters()] for cfg in configs)
    assert before != after


@pytest.mark.parametrize("key", REFUSED)
def test_value_that_is_not_supported_is_one_line(result, key):
    value, message = REFUSED[key]
    with pytest.raises(InputError, match=re.escape(message)) as error:
        result(key, value)
    assert "\n" not in str(error.value)


def _another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else [*value, *value] or [1]


def test_keys_without_a_meaning_here_change_nothing(result):
    tiny = dict(_leaves(get_config())) | OPTIONS
    overrides = [item for key in _indifferent_keys() for item in (key, _another(tiny[key]))]
    assert differences(result(*overrides), result()) == []


def test_keys_of_the_process_are_honoured(shapes, tmp_path, monkeypatch):
    keys = OPTIONS | CHANGES | SHORT | data_options(shapes)
    keys |= {"SSOD.HOST": "detectron2", "OUTPUT_DIR": tmp_path / "run", "CUDNN_BENCHMARK": True}
    keys |= {"FLOAT32_PRECISION": "high", "TEST.EXPECTED_RESULTS": [["bbox", "AP", 250.0, 1.0]]}
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, sum(keys.items(), ()))])
    with pytest.raises(SystemExit):  # the expected results are out of reach
        main()
    assert (tmp_path / "run" / "model_final.pth").exists()
    assert torch.backends.cudnn.benchmark
    # Detectron2 sets it where there are GPUs.
    if torch.cuda.is_available():
        assert torch.get_float32_matmul_precision() == "high"
        torch.set_float32_matmul_precision(precision)
