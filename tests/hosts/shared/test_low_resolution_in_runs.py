"""The low-resolution branch in a tiny run, with each pseudo-label filter."""

import shutil

import pytest
import torch

from ssod.errors import InputError
from ssod.hosts.metric_log import read_metrics
from ssod.hosts.torchvision.run import Run
from tiny_run import (
    read_state,
    tiny_config,
)

LSM = ("SSOD.LSM.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", 0.05, "SSOD.DATA.VAL_JSON", "")
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
    Run(tiny_config(shapes, output, *overrides)).train()
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


def test_weight_zero_trains_the_mean_teacher(shapes, tmp_path):
    keys = ("SSOD.DATA.VAL_JSON", "")
    zero = (*LSM, "SSOD.LSM.WEIGHT", 0, "SSOD.LSM.DISTILL_WEIGHT", 0)
    for name, overrides in {"plain": keys, "zero": (*keys, *zero)}.items():
        Run(tiny_config(shapes, tmp_path / name, *overrides)).train()
    expected, actual = (read_state(tmp_path / name)["model"] for name in ("plain", "zero"))
    own = {name: actual.pop(name) for name in list(actual) if name.startswith("methods.LSM.")}
    assert len(own) == 2
    # Region pooling adds up in another order, where the small image has gradients of zero.
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("LSM.HEAD", "both"), r"SSOD.LSM.HEAD must be one of \('aux', 'main'\), got 'both'"),
        (("LSM.LEVELS", "(1, 2)"), "SSOD.LSM.LEVELS must be some of"),
        (("FILTER.UNDECIDED_THRESH", 0.9), "SSOD.FILTER.UNDECIDED_THRESH must be in"),
        (("LSM.DISTILL_WEIGHT", -1), "SSOD.LSM.DISTILL_WEIGHT must be at least 0, got -1"),
    ],
)
def test_bad_value_is_one_line(shapes, tmp_path, keys, message):
    keys = (f"SSOD.{keys[0]}", keys[1])
    with pytest.raises(InputError, match=message):
        Run(tiny_config(shapes, tmp_path, *LSM, *keys))
