"""The low-resolution branch in a run of Detectron2."""

import shutil

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ssod.cli.main import main
from ssod.core.structures import Targets, TwoStreamBatch, Views
from ssod.errors import InputError
from ssod.hosts.checkpoint import read_checkpoint
from ssod.hosts.detectron2.export import export_config
from ssod.hosts.detectron2.run import Run, find_checkpoint
from ssod.hosts.metric_log import read_metrics
from tiny_detectron2 import tiny_config
from tiny_run import BURN_IN_ITERS, MAX_ITER, differences

LSM = (
    *(
        "SSOD.LSM.ENABLED",
        True,
        "SSOD.FILTER.UNDECIDED_THRESH",
        0.05,
        "SSOD.FILTER.SCORE_THRESH",
        0.9,
    ),
    *("SSOD.DATA.VAL_JSON", ""),
)
LOSSES = {"loss_cls_low_res_unsup", "loss_box_reg_low_res_unsup", "loss_distill_unsup"}


@pytest.fixture(scope="module")
def output(shapes, tmp_path_factory):
    """Folder of a finished run; not to be changed."""
    output = tmp_path_factory.mktemp("low_resolution") / "run"
    cfg = tiny_config(shapes, output, *LSM, "SSOD.LOG_PERIOD", 1)
    Run(cfg).train()
    (output / "config.yaml").write_text(cfg.dump())
    yield output
    shutil.rmtree(output)


def _model(state):
    return {n: v for n, v in state["model"].items() if n != "_extra_state"}


def test_regions_of_the_branch_are_counted_apart(output):
    lines = [line for line in read_metrics(output) if "loss_distill_unsup" in line]
    assert len(lines) == MAX_ITER - BURN_IN_ITERS
    assert all(any(line[name] > 0 for line in lines) for name in LOSSES)
    # Nothing is reliable, so there are objects for the second branch alone.
    assert all(line["unsup/roi_head/num_fg_samples"] == 0 for line in lines)
    assert any(line["unsup_lsm/roi_head/num_fg_samples"] > 0 for line in lines)


def test_resumed_run_equals_an_uninterrupted_one(output, shapes, tmp_path):
    keys = (*LSM, "SOLVER.MAX_ITER", BURN_IN_ITERS + 1)
    Run(tiny_config(shapes, tmp_path, *keys)).train()
    Run(tiny_config(shapes, tmp_path, *LSM), find_checkpoint(str(tmp_path))).train()
    states = [_model(read_checkpoint(run / "model_final.pth")) for run in (tmp_path, output)]
    assert differences(*states) == []


def test_export_leaves_the_branch_out(output, shapes, tmp_path):
    assert main(["export", str(output), "--output", str(tmp_path)]) == 0
    exported = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    assert exported.keys() == build_model(cfg).state_dict().keys()
    saved = read_checkpoint(output / "model_final.pth")["model"]
    assert any(name.startswith("methods.LSM.") for name in saved)
    assert all(torch.equal(value, saved[f"teacher.{name}"]) for name, value in exported.items())


def test_canonical_size_that_detectron2_cannot_be_told_is_not_exported(shapes, tmp_path):
    cfg = tiny_config(shapes, tmp_path, "SSOD.CANONICAL_BOX_SIZE", 56)
    with pytest.raises(InputError, match="SSOD.CANONICAL_BOX_SIZE 56 cannot be exported"):
        export_config(cfg, "model.pth")


def test_run_is_evaluated_by_a_config_without_the_branch(output, shapes, tmp_path):
    keys = [value for value in LSM if value != ""]
    keys[keys.index("SSOD.DATA.VAL_JSON") :] = ["SSOD.LSM.ENABLED", False]
    path = str(output / "model_final.pth")
    without = Run(tiny_config(shapes, tmp_path, *keys), path, for_training=False)
    assert not without.model.methods
    assert "bbox" in without.evaluate()["teacher"]


@pytest.mark.parametrize("head", ["aux", "main"])
@pytest.mark.parametrize("burn_in_iters", [0, 1])
@pytest.mark.parametrize("score_thresh", [0.9, 1.0])
def test_every_parameter_gets_a_gradient(shapes, tmp_path, head, burn_in_iters, score_thresh):
    """`DistributedDataParallel` without `find_unused_parameters` needs it in every iteration."""
    keys = ("SSOD.LSM.HEAD", head, "SSOD.BURN_IN_ITERS", burn_in_iters)
    alpha = 0.05 if score_thresh < 1 else 1.0  # nothing to learn at all
    keys += ("SSOD.FILTER.SCORE_THRESH", score_thresh, "SSOD.FILTER.UNDECIDED_THRESH", alpha)
    model = build_model(tiny_config(shapes, tmp_path, *LSM, *keys))
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8)]
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0]])
    targets = [Targets.from_ground_truth(boxes, torch.tensor([1]), 6)]
    model.start_teacher_if_due()
    batch = TwoStreamBatch(
        Views(images, images, targets, [1]), Views(images, images, None, [2]), []
    )
    with EventStorage():
        losses = model.train()(batch)
    assert (losses.keys() >= LOSSES) == (burn_in_iters == 0)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("methods.LSM.") for name in gradients) == (head == "aux")
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
