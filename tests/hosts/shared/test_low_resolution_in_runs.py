"""The low-resolution branch in a tiny run, with each pseudo-label filter."""

import shutil

import pytest
import torch

from ssod.errors import InputError
from ssod.hosts.metric_log import read_metrics
from ssod.hosts.torchvision.loop import Trainer
from tiny_run import BURN_IN_ITERS, MAX_ITER, differences, read_lines, read_state, tiny_config

LSM = ("SSOD.LSM.ENABLED", True, "SSOD.LSM.ALPHA", 0.05, "SSOD.DATA.VAL_JSON", "")
FILTERS = {
    "fixed": ("SSOD.FILTER.SCORE_THRESH", 0.9),  # an untrained detector is never that sure
    "act": ("SSOD.FILTER.NAME", "AdaptiveClassThreshold", "SSOD.FILTER.QUEUE_IMAGES", 64),
    "soft": ("SSOD.FILTER.NAME", "SoftMatchWeighting", "SSOD.FILTER.POOL_FLOOR", 0.0),
}


@pytest.fixture(scope="module", params=FILTERS)
def finished(request, shapes, tmp_path_factory):
    """Config overrides and folder of a finished run."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    overrides = (*LSM, *FILTERS[request.param])
    Trainer(tiny_config(shapes, output, *overrides)).train()
    yield overrides, output
    shutil.rmtree(output)


def test_every_filter_hands_boxes_to_the_branch(finished):
    overrides, output = finished
    lines = [line for line in read_metrics(output) if "loss_distill_unsup" in line]
    assert len(lines) == 2  # after the burn-in
    assert all(line["loss_cls_low_res_unsup"] > 0 for line in lines)
    assert any(line["loss_box_reg_low_res_unsup"] > 0 for line in lines)
    # Of ACT's boxes on so few images none is between the thresholds.
    is_act = "AdaptiveClassThreshold" in overrides
    assert any(line["loss_distill_unsup"] > 0 for line in lines) != is_act


def test_classifier_is_trained_with_the_student(finished):
    _, output = finished
    model = read_state(output)["model"]
    weight = "roi_heads.box_predictor.cls_score.weight"
    own = model["low_resolution.classifier.weight"]
    # torchvision keeps the background first.
    assert own.shape == model[f"student.{weight}"].shape
    assert not torch.equal(own, model[f"student.{weight}"].roll(-1, 0))
    assert not any(name.startswith("teacher.low_resolution") for name in model)


@pytest.mark.parametrize("stop", [BURN_IN_ITERS, MAX_ITER - 1])
def test_resumed_run_equals_an_uninterrupted_one(finished, stop, shapes, tmp_path):
    overrides, output = finished
    Trainer(tiny_config(shapes, tmp_path, *overrides, "SOLVER.MAX_ITER", stop)).train()
    Trainer(tiny_config(shapes, tmp_path, *overrides), resume=True).train()
    assert differences(read_state(tmp_path), read_state(output)) == []
    assert differences(read_lines(tmp_path)[-1], read_lines(output)[-1]) == []


def test_weight_zero_trains_the_mean_teacher(shapes, tmp_path):
    keys = ("SSOD.DATA.VAL_JSON", "")
    zero = (*LSM, "SSOD.LSM.WEIGHT", 0, "SSOD.LSM.DISTILL_WEIGHT", 0)
    for name, overrides in {"plain": keys, "zero": (*keys, *zero)}.items():
        Trainer(tiny_config(shapes, tmp_path / name, *overrides)).train()
    expected, actual = (read_state(tmp_path / name)["model"] for name in ("plain", "zero"))
    own = {name: actual.pop(name) for name in list(actual) if name.startswith("low_resolution.")}
    assert len(own) == 2
    # Region pooling adds up in another order, where the small image has gradients of zero.
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("other", [(), ("SSOD.LSM.HEAD", "main")])
def test_switching_the_branch_in_a_run_is_refused(finished, other, shapes, tmp_path, caplog):
    overrides, output = finished
    folder = shutil.copytree(output, tmp_path / "run")
    keys = ("SSOD.LSM.ENABLED", bool(other), *other)
    with caplog.at_level("INFO"), pytest.raises(InputError, match="its optimizer does not fit"):
        Trainer(tiny_config(shapes, folder, *overrides, *keys), resume=True)
    assert any("another second branch" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("HEAD", "both"), r"SSOD.LSM.HEAD must be one of \('aux', 'main'\), got 'both'"),
        (("LEVELS", "(1, 2)"), "SSOD.LSM.LEVELS must be some of"),
        (("ALPHA", 0.9), "SSOD.LSM.ALPHA must be in"),
        (("DISTILL_REGIONS", "all"), 'SSOD.LSM.DISTILL_REGIONS must be "pseudo" or "predicted"'),
    ],
)
def test_bad_value_is_one_line(shapes, tmp_path, keys, message):
    keys = (f"SSOD.LSM.{keys[0]}", keys[1])
    with pytest.raises(InputError, match=message):
        Trainer(tiny_config(shapes, tmp_path, *LSM, *keys))


def test_predicted_regions_need_the_fixed_threshold(shapes, tmp_path):
    keys = (*LSM, *FILTERS["soft"], "SSOD.LSM.DISTILL_REGIONS", "predicted")
    with pytest.raises(InputError, match="needs the two thresholds of SSOD.FILTER.NAME Fixed"):
        Trainer(tiny_config(shapes, tmp_path, *keys))


@pytest.mark.parametrize(
    "keys",
    [
        ("PROPOSALS", "main", "DISTILL_TARGET", "both", "DISTILL_DETACH", True),
        ("HEAD", "main", "RPN_LOSS", True, "WEIGHT", 1.0, "DISTILL_WEIGHT", 0.0),
        ("HEAD_INIT", "random", "RAMP_ITERS", 2, "INTERPOLATION", "nearest"),
        ("DISTILL_REGIONS", "predicted", "DISTILL_NORM", "distilled", "BOX_LOSS", "none"),
        ("LEVELS", "(3, 4)", "DROP_UNALIGNED", True, "IGNORE_LOW_SCORES", True),
    ],
)
def test_switches_reach_the_run(shapes, tmp_path, keys):
    overrides = [f"SSOD.LSM.{k}" if i % 2 == 0 else k for i, k in enumerate(keys)]
    trainer = Trainer(tiny_config(shapes, tmp_path, *LSM, *overrides))
    trainer.train()
    logged = {name for line in read_metrics(tmp_path) for name in line}
    assert ("loss_rpn_loc_low_res_unsup" in logged) == ("RPN_LOSS" in keys)
    assert ("loss_box_reg_low_res_unsup" in logged) == ("BOX_LOSS" not in keys)
    assert ("loss_distill_unsup" in logged) == ("DISTILL_WEIGHT" not in keys)
    branch = trainer.model.low_resolution
    for key, value in zip(keys[::2], keys[1::2], strict=True):
        if hasattr(branch, key.lower()):
            assert str(getattr(branch, key.lower())) == str(value)
