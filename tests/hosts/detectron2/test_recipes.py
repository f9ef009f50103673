"""The configs of the Detectron2 host against the published numbers, and against each other."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

import ssod.hosts.detectron2.catalog  # registers the unlabeled images of COCO
from ssod.config import merge_config, read_host
from ssod.hosts.detectron2.defaults import check_config, get_config, scale_to_world_size

ROOT = Path(ssod.__file__).parents[2]
FILES = {
    path.relative_to(ROOT / "configs").with_suffix("").as_posix(): path
    for pattern in ("Base-*.yaml", "coco-*/*.yaml", "voc/*.yaml")
    for path in sorted((ROOT / "configs").glob(pattern))
}
RECIPES = [name for name in FILES if not Path(name).name.startswith("Base-")]
SUPERVISED = [name for name in RECIPES if "/supervised_" in name]
LSM = [name for name in RECIPES if "/lsm_" in name]
DASO = [name for name in RECIPES if "/daso_" in name]
CCSSL = [name for name in RECIPES if "/ccssl_" in name]
ONE_GPU = "coco-standard/unbiased_teacher_R_50_FPN_1pct_1gpu"
PERCENTS = (1, 2, 5, 10)

COCO_SIZES = (640, 672, 704, 736, 768, 800)
VOC_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
SHARED = {
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.MASK_ON": False,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.POSITIVE_FRACTION": 0.25,
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.SMOOTH_L1_BETA": 0.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
    "INPUT.FORMAT": "BGR",
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.RANDOM_FLIP": "horizontal",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.WARMUP_FACTOR": 0.001,
    "SOLVER.WARMUP_METHOD": "linear",
    "SOLVER.CHECKPOINT_PERIOD": 5000,
    "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    "SOLVER.AMP.ENABLED": False,
    "TEST.DETECTIONS_PER_IMAGE": 100,
    "SSOD.OPTIMIZER": "SGD",
    "SSOD.FILTER.NAME": "FixedThreshold",
    "SSOD.FILTER.SCORE_THRESH": 0.7,
    "SSOD.FOCAL_GAMMA": 1.5,
    "SSOD.LABELED_VIEWS": "both",
    "SSOD.UNSUP_BOX_LOSSES": False,
    "SSOD.EVAL_MODEL": "teacher",
    "TEST.EVAL_PERIOD": 5000,  # a deviation
}
COLUMNS = (
    "DATASETS.TRAIN",
    "SSOD.DATA.PERCENT",
    "SSOD.DATA.UNLABELED",
    "DATASETS.TEST",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TEST",
    "SOLVER.IMS_PER_BATCH",
    "SSOD.DATA.UNLABELED_PER_BATCH",
    "SSOD.BURN_IN_ITERS",
    "SOLVER.MAX_ITER",
    "SSOD.UNSUP_LOSS_WEIGHT",
    "SSOD.EMA_DECAY",
)
COCO = (("coco_2017_val",), 80, COCO_SIZES, 800, 32, 32)
VOC = (("voc_2007_test",), 20, VOC_SIZES, 600, 16, 16)
PUBLISHED = {
    f"coco-standard/unbiased_teacher_R_50_FPN_{percent}pct": (
        *(("coco_2017_train",), percent, (), *COCO),
        *(2000, 180000, 4.0, 0.9996),
    )
    for percent in PERCENTS
} | {
    "coco-additional/unbiased_teacher_R_50_FPN": (
        *(("coco_2017_train",), 0, ("coco_2017_unlabeled",), *COCO),
        *(90000, 360000, 2.0, 0.9996),
    ),
    "coco-imagenet/unbiased_teacher_R_50_FPN": (
        *(("coco_2017_train",), 0, (), *COCO),
        *(90000, 360000, 2.0, 0.9996),
    ),
    "voc/unbiased_teacher_R_50_FPN": (
        *(("voc_2007_trainval",), 0, ("voc_2012_trainval",), *VOC),
        *(30000, 180000, 2.0, 0.999),
    ),
}

LABEL_MATCH_SHARED = SHARED | {
    "MODEL.RPN.POSITIVE_FRACTION": 0.5,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_ITERS": 500,
    "SSOD.UNSUP_LOSS_WEIGHT": 2.0,
    "SSOD.EMA_DECAY": 0.996,
    "SSOD.FILTER.NAME": "AdaptiveClassThreshold",
    "SSOD.FILTER.SOURCE": "sweep",
    "SSOD.FILTER.REFRESH_PERIOD": 1000,
    "SSOD.FILTER.SWEEP_IMAGES": 10000,
    "SSOD.FILTER.RELIABLE_FRACTION": 0.2,
    "SSOD.LABEL_MATCH.ENABLED": True,
    "SSOD.LABEL_MATCH.WEIGHT": 1.0,
    "SSOD.LABEL_MATCH.NORMALIZER": "sampled",
    "SSOD.LABEL_MATCH.MINING": "student",
    "SSOD.RPN_IGNORE_WEIGHT": 0.0,
    "SSOD.UNSUP_BOX_LOSSES": True,
    "SSOD.FOCAL_GAMMA": 0.0,
    "SSOD.LABELED_VIEWS": "strong",  # with erasing: a deviation, as are the training's sizes
    "INPUT.MIN_SIZE_TRAIN": COCO_SIZES,
    "INPUT.MIN_SIZE_TEST": 800,
}
LABEL_MATCH_COLUMNS = (
    "DATASETS.TRAIN",
    "SSOD.DATA.PERCENT",
    "SSOD.DATA.UNLABELED",
    "DATASETS.TEST",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "SOLVER.IMS_PER_BATCH",
    "SSOD.DATA.UNLABELED_PER_BATCH",
    "SOLVER.BASE_LR",
)
LABEL_MATCH = {
    f"coco-standard/labelmatch_R_50_FPN_{percent}pct": (
        *(("coco_2017_train",), percent, (), ("coco_2017_val",), 80),
        *(16, 16, 0.02 * 16 / 32),
    )
    for percent in (1, 5, 10)
} | {
    "coco-additional/labelmatch_R_50_FPN": (
        *(("coco_2017_train",), 0, ("coco_2017_unlabeled",), ("coco_2017_val",), 80),
        *(32, 32, 0.004 * 32 / 32),
    ),
    "voc/labelmatch_R_50_FPN": (
        *(("voc_2007_trainval",), 0, ("voc_2012_trainval",), ("voc_2007_test",), 20),
        *(16, 16, 0.01 * 16 / 32),
    ),
}
# Epochs of the burn-in and images with labels; then iterations, and those that decay the rate.
LABEL_MATCH_SCHEDULES = {
    "coco-standard/labelmatch_R_50_FPN_1pct": (12 * 5, 1173, 160000, ()),
    "coco-standard/labelmatch_R_50_FPN_5pct": (12 * 2, 5863, 160000, ()),
    "coco-standard/labelmatch_R_50_FPN_10pct": (12 * 2, 11727, 160000, ()),
    "coco-additional/labelmatch_R_50_FPN": (12, 117266, 540000, (360000, 480000)),
    "voc/labelmatch_R_50_FPN": (12, 5011, 160000, ()),
}
# Of Soft Teacher's configs, which its successors share.
JITTERED = SHARED | {
    "MODEL.RPN.POSITIVE_FRACTION": 0.5,
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
    "INPUT.MIN_SIZE_TRAIN": (400, 1200),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
    "INPUT.MIN_SIZE_TEST": 800,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.REFERENCE_WORLD_SIZE": 8,
    "SOLVER.WARMUP_ITERS": 500,
    "SSOD.BURN_IN_ITERS": 0,
    "SSOD.UNSUP_BOX_LOSSES": True,
    "SSOD.FOCAL_GAMMA": 0.0,
    "SSOD.LABELED_VIEWS": "weak",  # without a change of colour: a deviation
    "SSOD.VIEWS.INDEPENDENT": True,
    "SSOD.VIEWS.WARP": True,
    "SSOD.DATA.UNLABELED_PER_BATCH": 32,
}
SOFT_TEACHER = {
    "SOLVER.MAX_ITER": 180000,
    "SOLVER.STEPS": (120000, 160000),
    "SOLVER.AMP.ENABLED": True,
    "SSOD.AMP_DTYPE": "float16",
    "SSOD.EMA_DECAY": 0.999,
    "SSOD.EMA_GAMMA": 1.0,
    "SSOD.UNSUP_LOSS_WEIGHT": 4.0,
    "SSOD.FILTER.SCORE_THRESH": 0.9,
    "SSOD.FILTER.UNDECIDED_THRESH": 0.5,
    "SSOD.SOFT_TEACHER.ENABLED": True,
    "SSOD.SOFT_TEACHER.BACKGROUND": True,
    "SSOD.SOFT_TEACHER.JITTER": True,
}
PSECO = {
    "SOLVER.AMP.ENABLED": True,
    "SSOD.EMA_DECAY": 0.999,
    "SSOD.EMA_GAMMA": 1.0,
    "SSOD.UNSUP_LOSS_WEIGHT": 2.0,
    "SSOD.FILTER.SCORE_THRESH": 0.6,
    "SSOD.FILTER.UNDECIDED_THRESH": 0.6,
    "SSOD.PSECO.ENABLED": True,
    "SSOD.PSECO.ASSIGNMENT": True,
    "SSOD.PSECO.VOTING": True,
    "SSOD.LSM.ENABLED": True,
    "SSOD.LSM.WEIGHT": 1.0,
    "SSOD.LSM.HEAD": "main",
    "SSOD.LSM.RPN_LOSS": True,
    "SSOD.LSM.DISTILL_WEIGHT": 0.0,
}
PSECO_SCHEDULES = {1: (90000, (60000,)), 5: (180000, (120000,)), 10: (180000, (120000,))}
MIXPL = {
    "SOLVER.MAX_ITER": 180000,
    "SOLVER.STEPS": (),
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 20.0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "SSOD.UNSUP_LOSS_WEIGHT": 2.0,
    "SSOD.EMPTY_IMAGES": "share",  # stricter: a deviation
    "SSOD.MIXPL.ENABLED": True,
    "SSOD.MIXPL.MIXUP": True,
    "SSOD.MIXPL.MOSAIC_WEIGHT": 0.5,
}
SUCCESSORS = {
    f"coco-standard/{name}_R_50_FPN_{percent}pct": own | {"SSOD.DATA.PERCENT": percent}
    for percent in (1, 5, 10)
    for name, own in (("soft_teacher", SOFT_TEACHER), ("pseco", PSECO), ("mixpl", MIXPL))
}
STRONG = [f"coco-standard/strong_R_50_FPN_{percent}pct" for percent in (1, 5, 10)]
EXPECTED = {
    name: shared | dict(zip(columns, row, strict=True))
    for shared, columns, rows in (
        (SHARED, COLUMNS, PUBLISHED),
        (LABEL_MATCH_SHARED, LABEL_MATCH_COLUMNS, LABEL_MATCH),
    )
    for name, row in rows.items()
} | {name: JITTERED | own for name, own in SUCCESSORS.items()}


def _leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def _config(name):
    cfg = merge_config(get_config(), str(FILES[name]))
    cfg.freeze()
    return cfg


def _values(name):
    return dict(_leaves(_config(name)))


def _difference(name, other):
    """Return the keys whose values differ, with the values of the first."""
    values, others = _values(name), _values(other)
    return {key: value for key, value in values.items() if value != others[key]}


def _learning_rates(cfg, iterations):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for iteration in iterations:
        scheduler.last_epoch = iteration - 1
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    return rates


def test_every_recipe_is_here():
    others = {
        name.replace("unbiased_teacher", other)
        for name in PUBLISHED
        for other in ("supervised", "lsm")
    }
    more = {*LABEL_MATCH, *DASO, *CCSSL, *SUCCESSORS, *STRONG}
    assert set(RECIPES) == {*PUBLISHED, *others, *more, ONE_GPU}
    assert set(DASO) == {f"coco-standard/daso_R_50_FPN_{p}pct" for p in (1, 10)}
    assert set(CCSSL) == {f"coco-standard/ccssl_R_50_FPN_{p}pct" for p in (1, 10)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_supported_and_documented(name):
    cfg = _config(name)
    assert read_host(str(FILES[name])) == "detectron2"
    check_config(cfg)
    sets = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *cfg.SSOD.DATA.UNLABELED}
    assert sets <= set(DatasetCatalog.list())
    assert f"configs/{name}.yaml" in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_no_key_repeats_what_it_inherits(name):
    own = yaml.safe_load(FILES[name].read_text())
    base = own.pop("_BASE_", None)
    inherited = get_config()
    if base is not None:
        merge_config(inherited, str(FILES[name].parent / base))
    inherited, values = dict(_leaves(inherited)), _values(name)
    repeated = {key for key, _ in _leaves(own) if values[key] == inherited[key]}
    # Whoever reads the file chooses the host by it, before there are defaults.
    assert repeated == (set() if base else {"SSOD.HOST"})


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_are_the_published_ones(name):
    values = _values(name)
    assert {key: values[key] for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", LABEL_MATCH)
def test_schedule_of_label_match_is_the_published_one_after_its_burn_in(name):
    epochs, images, iterations, steps = LABEL_MATCH_SCHEDULES[name]
    cfg = _config(name)
    burn_in = cfg.SSOD.BURN_IN_ITERS
    assert burn_in * cfg.SOLVER.IMS_PER_BATCH == pytest.approx(epochs * images, rel=0.001)
    assert burn_in + iterations == cfg.SOLVER.MAX_ITER
    assert tuple(burn_in + step for step in steps) == cfg.SOLVER.STEPS
    decayed = [cfg.SOLVER.BASE_LR * 0.1 ** (count + 1) for count in range(len(steps))]
    assert _learning_rates(cfg, cfg.SOLVER.STEPS) == pytest.approx(decayed)


@pytest.mark.parametrize("percent", PSECO_SCHEDULES)
def test_schedule_of_pseco_is_shorter_at_one_percent(percent):
    cfg = _config(f"coco-standard/pseco_R_50_FPN_{percent}pct")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == PSECO_SCHEDULES[percent]


@pytest.mark.parametrize("name", [name for name in SUCCESSORS if "mixpl" in name])
def test_average_of_mixpl_is_the_published_one_of_every_third_iteration(name):
    cfg = _config(name)
    teacher = math.prod(1 - max(0.0002, 4 / (4 + t)) for t in range(30000, 60000, 3))
    ours = (
        min(cfg.SSOD.EMA_DECAY, 1 - cfg.SSOD.EMA_GAMMA / (cfg.SSOD.EMA_GAMMA + t))
        for t in range(30000, 60000)
    )
    assert math.prod(ours) == pytest.approx(teacher, rel=0.01)
    early = [max(0.0002, 4 / (4 + t)) for t in range(300, 6000, 3)]
    ours = [cfg.SSOD.EMA_GAMMA / (cfg.SSOD.EMA_GAMMA + t) for t in range(300, 6000)]
    kept = (math.prod(1 - share for share in shares) for shares in (early, ours))
    assert next(kept) == pytest.approx(next(kept), rel=0.05)


@pytest.mark.parametrize("name", STRONG)
def test_strong_is_mixpl_with_a_burn_in_and_the_second_branch(name):
    added = {"SSOD.LSM.ENABLED": True, "SSOD.BURN_IN_ITERS": 2000}
    assert _difference(name, name.replace("strong", "mixpl")) == added


@pytest.mark.parametrize("name", EXPECTED)
def test_learning_rate_is_constant_after_the_warm_up(name):
    cfg = _config(name)
    warm_up, rate = cfg.SOLVER.WARMUP_ITERS, EXPECTED[name]["SOLVER.BASE_LR"]
    last = min((cfg.SOLVER.MAX_ITER, *cfg.SOLVER.STEPS)) - 1
    rates = _learning_rates(cfg, [0, warm_up // 2, warm_up, last // 2, last])
    expected = [0.001 * rate, 0.5005 * rate, rate, rate, rate]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_baseline_differs_in_the_weight_alone(name):
    recipe = name.replace("supervised", "unbiased_teacher")
    assert _difference(name, recipe) == {"SSOD.UNSUP_LOSS_WEIGHT": 0.0}


@pytest.mark.parametrize("name", LSM)
def test_lsm_is_added_to_the_recipe_with_the_published_thresholds(name):
    recipe = name.replace("lsm", "unbiased_teacher")
    assert _difference(name, recipe) == {"SSOD.LSM.ENABLED": True}
    cfg = _config(name)
    assert (cfg.SSOD.FILTER.UNDECIDED_THRESH, cfg.SSOD.FILTER.SCORE_THRESH) == (0.5, 0.7)
    assert cfg.SSOD.LSM.LEVELS == (2, 3, 4)


@pytest.mark.parametrize("name", DASO)
def test_daso_is_added_to_the_recipe_with_the_published_delay_and_weight(name):
    recipe = name.replace("daso", "unbiased_teacher")
    added = {"SSOD.DASO.ENABLED": True, "SSOD.DASO.DELAY": 3600, "SSOD.DASO.WEIGHT": 0.25}
    assert _difference(name, recipe) == added
    assert added["SSOD.DASO.WEIGHT"] * _config(name).SSOD.UNSUP_LOSS_WEIGHT == 1
    assert added["SSOD.DASO.DELAY"] == 0.02 * _config(name).SOLVER.MAX_ITER


@pytest.mark.parametrize("name", CCSSL)
def test_ccssl_is_added_to_the_recipe(name):
    recipe = name.replace("ccssl", "unbiased_teacher")
    assert _difference(name, recipe) == {"SSOD.CONTRASTIVE.ENABLED": True}


def test_recipes_of_coco_standard_differ_in_the_percentage_alone():
    first, *others = (f"coco-standard/unbiased_teacher_R_50_FPN_{p}pct" for p in PERCENTS)
    for name, percent in zip(others, PERCENTS[1:], strict=True):
        assert _difference(name, first) == {"SSOD.DATA.PERCENT": percent}


def test_label_match_recipes_of_coco_standard_differ_in_percentage_and_burn_in_alone():
    first, *others = (name for name in LABEL_MATCH if name.startswith("coco-standard/"))
    for name in others:
        keys = {"SSOD.DATA.PERCENT", "SSOD.BURN_IN_ITERS", "SOLVER.MAX_ITER"}
        assert set(_difference(name, first)) == keys


def test_coco_imagenet_differs_from_coco_additional_in_the_unlabeled_images_alone():
    recipe = "coco-imagenet/unbiased_teacher_R_50_FPN"
    assert _difference(recipe, "coco-additional/unbiased_teacher_R_50_FPN") == {
        "SSOD.DATA.UNLABELED": (),
        "SSOD.DATA.UNLABELED_INDEX": "datasets/imagenet/train_20pct.tsv",
    }
    # Where the index is to be written.
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert "--output $DETECTRON2_DATASETS/imagenet/train_20pct.tsv" in text


def test_one_gpu_variant_takes_the_share_of_each_gpu_in_every_pass():
    recipe = ONE_GPU.removesuffix("_1gpu")
    reference = _config(recipe).SOLVER.REFERENCE_WORLD_SIZE
    assert _difference(ONE_GPU, recipe) == {
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "SSOD.ACCUMULATE_STEPS": reference,
    }
    assert scale_to_world_size(_config(ONE_GPU), 1) == _config(ONE_GPU)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", [name for name in RECIPES if name != ONE_GPU])
def test_scaling_keeps_learning_rate_an_image_and_images_seen(name, world_size):
    cfg = _config(name)
    scaled = scale_to_world_size(cfg, world_size)
    factor = world_size / 8

    def amounts(cfg):
        solver, data, labeled = cfg.SOLVER, cfg.SSOD.DATA, cfg.SOLVER.IMS_PER_BATCH
        return {
            "learning rate": solver.BASE_LR / labeled,
            "ratio": data.UNLABELED_PER_BATCH / labeled,
            "training": solver.MAX_ITER * labeled,
            "warm-up": solver.WARMUP_ITERS * labeled,
            "burn-in": cfg.SSOD.BURN_IN_ITERS * labeled,
            "evaluation": cfg.TEST.EVAL_PERIOD * labeled,
            "checkpoint": solver.CHECKPOINT_PERIOD * labeled,
            "decay": math.log(cfg.SSOD.EMA_DECAY) / labeled,
            "sweeps": cfg.SSOD.FILTER.REFRESH_PERIOD * labeled,
            "statistics": math.log(cfg.SSOD.FILTER.EMA_DECAY) / labeled,
        }

    assert scaled.SOLVER.IMS_PER_BATCH == cfg.SOLVER.IMS_PER_BATCH * factor
    assert amounts(scaled) == pytest.approx(amounts(cfg))
    steps, labeled = scaled.SOLVER.STEPS, scaled.SOLVER.IMS_PER_BATCH
    images = [step * cfg.SOLVER.IMS_PER_BATCH for step in cfg.SOLVER.STEPS]
    assert [step * labeled for step in steps] == pytest.approx(images)


@pytest.mark.parametrize("name", RECIPES)
def test_batches_divide_evenly(name):
    cfg = _config(name)
    processes = cfg.SOLVER.REFERENCE_WORLD_SIZE or 1
    for batch in (cfg.SOLVER.IMS_PER_BATCH, cfg.SSOD.DATA.UNLABELED_PER_BATCH):
        assert batch % (processes * cfg.SSOD.ACCUMULATE_STEPS) == 0


def test_recipe_builds_its_model():
    cfg = _config("voc/unbiased_teacher_R_50_FPN").clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    assert (model.burn_in_iters, model.ema_decay, model.unsup_loss_weight) == (30000, 0.999, 2.0)
    assert model.student.num_classes == model.teacher.num_classes == 20
    assert model.student.proposal_generator.positive_fraction == 0.25
    stages = model.student.backbone.bottom_up.stages
    assert [len(stage) for stage in stages] == [3, 4, 6, 3]
    trainable = [any(p.requires_grad for p in stage.parameters()) for stage in stages]
    assert trainable == [False, True, True, True]


def test_label_match_recipe_builds_its_parts():
    cfg = _config("voc/labelmatch_R_50_FPN").clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    # What has no key.
    method = model.methods["LABEL_MATCH"]
    assert (method.min_score, method.min_iou, method.temperature) == (0.8, 0.8, 0.5)
    assert model.pseudo_label_filter.min_score == 0.05
    assert model.student.proposal_generator.positive_fraction == 0.5
    assert model.student.roi_heads.box_predictor.bbox_pred.out_features == 4
