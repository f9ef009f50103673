"""A run small enough to be trained in a second or two: its data, config and results."""

from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from ssod.config import merge_config
from ssod.data.shapes import ShapesSpec
from ssod.hosts.metric_log import read_metrics
from ssod.hosts.torchvision.defaults import get_config
from ssod.hosts.torchvision.run import CHECKPOINT_NAME, Run, find_checkpoint

SPEC = ShapesSpec(num_labeled=6, num_unlabeled=6, num_val=4, image_size=64)
BURN_IN_ITERS, MAX_ITER, EVAL_PERIOD = 2, 5, 3
LOG_PERIOD = 2
OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [24], [32], [48]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.ROI_HEADS.NUM_CLASSES": 6,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    # So little training finds nothing; with every detection kept, each step has something to do.
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "INPUT.MIN_SIZE_TRAIN": [48, 64],
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.STEPS": [4],
    "SOLVER.MAX_ITER": MAX_ITER,
    "TEST.EVAL_PERIOD": EVAL_PERIOD,
    "TEST.DETECTIONS_PER_IMAGE": 20,
    "SSOD.BURN_IN_ITERS": BURN_IN_ITERS,
    "SSOD.EMA_DECAY": 0.5,
    "SSOD.UNSUP_BOX_LOSSES": True,
    "SSOD.LABELED_VIEWS": "strong",
    "SSOD.FILTER.SCORE_THRESH": 0.1,
    "SSOD.DATA.UNLABELED_PER_BATCH": 2,
    "SSOD.LOG_PERIOD": LOG_PERIOD,
}


def data_options(shapes: Path) -> dict[str, Path]:
    """Return the keys of the data in `shapes`."""
    data = {"SSOD.DATA.UNLABELED_TRUTH_JSON": shapes / "annotations" / "unlabeled_truth.json"}
    for group in ("LABELED", "UNLABELED", "VAL"):
        data[f"SSOD.DATA.{group}_JSON"] = shapes / "annotations" / f"{group.lower()}.json"
        data[f"SSOD.DATA.{group}_IMAGES"] = shapes / "images"
    return data


def tiny_options(shapes: Path, output: Path) -> list[str]:
    """Return the run's `KEY VALUE ...` with the data in `shapes`."""
    pairs = OPTIONS | data_options(shapes) | {"OUTPUT_DIR": output}
    return [str(item) for pair in pairs.items() for item in pair]


def tiny_config(shapes: Path, output: Path, *overrides: object) -> CfgNode:
    """Return the run's config with `KEY, VALUE, ...` overrides."""
    options = tiny_options(shapes, output) + [str(item) for item in overrides]
    cfg = merge_config(get_config(), "", options)
    cfg.freeze()
    return cfg


def resume(cfg: CfgNode) -> Run:
    """Return the run in the config's folder, to be continued."""
    return Run(cfg, find_checkpoint(cfg.OUTPUT_DIR))


def train(cfg: CfgNode, resumed: bool = False) -> None:
    """Train up to the end."""
    (resume(cfg) if resumed else Run(cfg)).train()


def read_state(output: Path) -> dict:
    """Return the model and the optimizer of a run's checkpoint."""
    state = torch.load(output / CHECKPOINT_NAME, weights_only=True)
    return {"model": state["model"], "optimizer": state["optimizer"]}


def read_lines(output: Path) -> list[dict]:
    """Return the lines of a run's metrics without times."""
    return [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in read_metrics(output)
    ]


def differences(actual: object, expected: object, name: str = "") -> list[str]:
    """Return the names of entries of nested containers that are not bit for bit the same."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        if actual.keys() != expected.keys():
            return [f"{name}: keys {sorted(actual.keys() ^ expected.keys(), key=str)}"]
        pairs = ((key, actual[key], expected[key]) for key in expected)
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(actual) != len(expected):
            return [f"{name}: {len(actual)} instead of {len(expected)} entries"]
        pairs = ((index, *pair) for index, pair in enumerate(zip(actual, expected, strict=True)))
    elif isinstance(expected, torch.Tensor):
        same = expected.dtype == actual.dtype and torch.equal(actual, expected)
        return [] if same else [name]
    else:  # NaN, which AP is without ground truth, is the same as itself
        same = actual == expected or (actual != actual and expected != expected)
        return [] if same else [f"{name}: {actual!r} instead of {expected!r}"]
    return [d for key, *values in pairs for d in differences(*values, f"{name}/{key}")]


def snapshot(output: Path) -> dict[str, tuple[int, int]]:
    """Return time and size of the files of a run; its predictions may be written again."""
    files = [path for path in output.rglob("*") if path.is_file() and "inference" not in path.parts]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
