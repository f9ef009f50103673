import pytest

from ssod.config import _leaves, merge_config
from ssod.errors import InputError
from ssod.hosts.detectron2.defaults import check_config, get_config, scale_to_world_size
from test_config import PACKAGE, READ_ELSEWHERE, dead_keys


def test_every_key_of_this_project_is_read_on_this_host():
    keys = {key for key, _ in _leaves(get_config()) if key.startswith("SSOD.")} - READ_ELSEWHERE
    assert len(keys) > 20
    assert dead_keys("detectron2", keys) == set()


def test_the_defaults_can_be_used():
    check_config(get_config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.CROP.ENABLED", "True"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("DATALOADER.ASPECT_RATIO_GROUPING", "False"),
        ("TEST.AUG.ENABLED", "True"),
        ("TEST.PRECISE_BN.ENABLED", "True"),
        ("VIS_PERIOD", "10"),
        ("VERSION", "1"),
        ("FLOAT32_PRECISION", "low"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "iou"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
        ("INPUT.FORMAT", "L"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    ],
)
def test_what_would_be_left_out_in_silence_is_refused(key, value):
    with pytest.raises(InputError, match=f"{key} must be .*nothing else is supported"):
        check_config(merge_config(get_config(), "", [key, value]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SOLVER.NESTEROV", "True", "SSOD.OPTIMIZER", "AdamW"), "NESTEROV .* got AdamW and 0.9"),
        (("SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0"), "NESTEROV .* got SGD and 0.0"),
        (("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, True]"), "needs a GPU"),
    ],
)
def test_what_another_key_leaves_no_meaning_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        check_config(merge_config(get_config(), "", ["MODEL.DEVICE", "cpu", *overrides]))


def _schedule(cfg):
    solver, ssod = cfg.SOLVER, cfg.SSOD
    return {
        "labeled": solver.IMS_PER_BATCH,
        "unlabeled": ssod.DATA.UNLABELED_PER_BATCH,
        "lr": solver.BASE_LR,
        "iterations": solver.MAX_ITER,
        "steps": solver.STEPS,
        "warm-up": solver.WARMUP_ITERS,
        "burn-in": ssod.BURN_IN_ITERS,
        "refresh": ssod.FILTER.REFRESH_PERIOD,
        "ramp": ssod.CONTRASTIVE.RAMP_ITERS,
        "DASO": (ssod.DASO.DELAY, ssod.DASO.WINDOW),
    }


@pytest.fixture
def cfg():
    overrides = ("SOLVER.REFERENCE_WORLD_SIZE", "4", "SSOD.DATA.UNLABELED_PER_BATCH", "8")
    return merge_config(get_config(), "", (*overrides, "SSOD.EMA_GAMMA", "4"))


def test_all_that_depends_on_the_batch_is_scaled(cfg):
    cfg.freeze()
    scaled = scale_to_world_size(cfg, 8)
    assert _schedule(cfg)["labeled"] == 16
    assert _schedule(scaled) == {
        "labeled": 32,
        "unlabeled": 16,
        "lr": pytest.approx(0.002),
        "iterations": 20000,
        "steps": (15000,),
        "warm-up": 500,
        "burn-in": 1000,
        "refresh": 500,
        "ramp": 1000,
        "DASO": (500, 50),
    }
    # The share of the teacher that is left after as many images is the same.
    assert scaled.SSOD.EMA_DECAY == pytest.approx(0.9996**2)
    assert scaled.SSOD.FILTER.EMA_DECAY == pytest.approx(0.999**2)
    assert scaled.SSOD.EMA_GAMMA == cfg.SSOD.EMA_GAMMA == 4
    assert scaled.is_frozen() and cfg.SOLVER.IMS_PER_BATCH == 16
    assert _schedule(scale_to_world_size(scaled, 4)) == _schedule(cfg)


def test_a_training_has_as_many_sweeps_on_any_number_of_gpus():
    path = PACKAGE.parents[1] / "configs/coco-standard/unbiased_teacher_R_50_FPN_1pct.yaml"
    cfg = merge_config(get_config(), str(path), ["SSOD.FILTER.SOURCE", "sweep"])
    for num_gpus in (1, 2, 4, 8, 16):
        scaled = scale_to_world_size(cfg, num_gpus)
        iterations = scaled.SOLVER.MAX_ITER - scaled.SSOD.BURN_IN_ITERS
        assert iterations / scaled.SSOD.FILTER.REFRESH_PERIOD == 178


@pytest.mark.parametrize(("period", "expected"), [(10, 1), (1, 1), (0, 0)])
def test_a_period_is_scaled_to_one_at_least_and_a_wrong_one_stays_wrong(cfg, period, expected):
    cfg.SSOD.FILTER.REFRESH_PERIOD = cfg.SSOD.DASO.WINDOW = period
    scaled = scale_to_world_size(cfg, 64).SSOD
    assert scaled.FILTER.REFRESH_PERIOD == scaled.DASO.WINDOW == expected


def test_a_wrong_decay_stays_wrong(cfg):
    cfg.SSOD.EMA_DECAY, cfg.SSOD.FILTER.EMA_DECAY = -0.5, 1.5
    scaled = scale_to_world_size(cfg, 1).SSOD
    assert scaled.EMA_DECAY < 0 and scaled.FILTER.EMA_DECAY > 1


def test_nothing_is_scaled_without_need(cfg):
    assert scale_to_world_size(cfg, 4) is cfg
    assert scale_to_world_size(get_config(), 4) == get_config()


def test_batch_that_cannot_be_scaled_is_refused(cfg):
    cfg.SSOD.DATA.UNLABELED_PER_BATCH = 6
    message = "UNLABELED_PER_BATCH must be a multiple of .*REFERENCE_WORLD_SIZE 4 .*, got 6"
    with pytest.raises(InputError, match=message):
        scale_to_world_size(cfg, 2)
