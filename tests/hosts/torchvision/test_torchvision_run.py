import json
import logging
import shutil
from argparse import Namespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssod.config import merge_config
from ssod.errors import InputError
from ssod.hosts.metric_log import LOG_NAME, read_metrics
from ssod.hosts.protocol import CONFIG_NAME
from ssod.hosts.run import usable_device
from ssod.hosts.torchvision.build import build_model
from ssod.hosts.torchvision.defaults import get_config
from ssod.hosts.torchvision.metric_writer import MetricLog
from ssod.hosts.torchvision.run import CHECKPOINT_NAME, Run, run
from ssod.hosts.torchvision.schedule import learning_rate
from tiny_run import (
    BURN_IN_ITERS,
    EVAL_PERIOD,
    MAX_ITER,
    differences,
    read_lines,
    read_state,
    resume,
    snapshot,
    tiny_config,
    train,
)

SUPERVISED = ("SSOD.UNSUP_LOSS_WEIGHT", 0)
TWO_STEPS = ("SOLVER.MAX_ITER", 2, "SSOD.BURN_IN_ITERS", 1, "SSOD.DATA.VAL_JSON", "")
ADAMW = (
    *("TEST.EVAL_PERIOD", 0, "MODEL.RESNETS.NORM", "GN", "SSOD.OPTIMIZER", "AdamW"),
    *("SOLVER.BASE_LR", 0.001),
    *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5),
)


@pytest.fixture(scope="module")
def adamw_run(shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("adamw") / "run"
    train(tiny_config(shapes, output, *ADAMW))
    return output


@pytest.fixture(scope="module")
def burn_in(shapes, tmp_path_factory):
    """Folder of a supervised run that ended with the burn-in."""
    output = tmp_path_factory.mktemp("burn_in") / "run"
    train(tiny_config(shapes, output, "SOLVER.MAX_ITER", BURN_IN_ITERS, *SUPERVISED))
    return output


@pytest.fixture
def output(tmp_path):
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # checkpoints are large


def _interrupt_at(run, iteration):
    prepare = run.step.prepare

    def interrupted():
        if run.model.iteration == iteration:
            raise KeyboardInterrupt
        prepare()

    run.step.prepare = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.train()


@pytest.mark.parametrize(
    ("reference", "overrides", "saved_at", "stopped_at"),
    [("first_run", (), 1, 1), ("first_run", (), 3, 4), ("adamw_run", ADAMW, 3, 4)],
    ids=["BN in the burn-in", "BN after it", "GN, AdamW, clipped"],
)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    reference, overrides, saved_at, stopped_at, shapes, output, request
):
    reference = request.getfixturevalue(reference)
    cfg = tiny_config(shapes, output, *overrides, "SOLVER.CHECKPOINT_PERIOD", saved_at)
    _interrupt_at(Run(cfg), stopped_at)
    iteration, teacher_started = read_state(output)["model"]["_extra_state"].tolist()
    assert (iteration, bool(teacher_started)) == (saved_at, saved_at >= BURN_IN_ITERS)
    past = [line["iteration"] for line in read_lines(output) if line["iteration"] > saved_at]
    assert bool(past) == (stopped_at > saved_at)  # lines that are written a second time

    train(cfg, resumed=True)
    assert differences(read_state(output), read_state(reference)) == []
    assert differences(read_lines(output), read_lines(reference)) == []


def test_supervised_burn_in_continued_with_workers_equals_a_semi_supervised_run_without(
    burn_in, first_run, shapes, output
):
    shutil.copytree(burn_in, output)
    train(tiny_config(shapes, output, "DATALOADER.NUM_WORKERS", 1), resumed=True)
    assert differences(read_state(output), read_state(first_run)) == []
    after = [
        [line for line in read_lines(run) if line["iteration"] > BURN_IN_ITERS]
        for run in (output, first_run)
    ]
    assert differences(*after) == []


def test_evaluation_leaves_training_alone(first_run, finished_run):
    # The validation sets differ, and with them what was evaluated at EVAL_PERIOD.
    aps = [read_lines(run)[-1]["teacher/AP"] for run in (first_run, finished_run)]
    assert aps[0] != aps[1]
    assert differences(read_state(finished_run), read_state(first_run)) == []


def test_a_line_is_written_each_log_period_and_each_evaluation(first_run):
    written = [
        (line["iteration"], "student/AP" in line, "total_loss" in line)
        for line in read_lines(first_run)
    ]
    losses, evaluation = (False, True), (True, False)
    assert written == [(2, *losses), (3, *evaluation), (4, *losses), (5, *losses), (5, *evaluation)]


def test_lines_hold_losses_metrics_rate_and_times(first_run, shapes):
    supervised = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    cfg = tiny_config(shapes, first_run)
    for line in read_metrics(first_run):
        if "total_loss" not in line:
            continue
        losses = {name for name in line if name.startswith("loss_")}
        uses_unlabeled = line["iteration"] > BURN_IN_ITERS
        expected = supervised | {f"{n}_unsup" for n in supervised if uses_unlabeled}
        assert losses == expected
        assert line["total_loss"] == pytest.approx(sum(line[name] for name in losses))
        assert ("pseudo/num_per_image" in line) == uses_unlabeled
        assert not uses_unlabeled or line["pseudo/num_per_image"] > 0
        assert line["lr"] == learning_rate(cfg, line["iteration"] - 1)
        assert 0 < line["time/data"] < line["time/step"]


def test_tensorboard_gets_the_same_values(first_run):
    events = EventAccumulator(str(first_run)).Reload()
    lines = read_metrics(first_run)
    for name in ("total_loss", "time/step", "student/AP", "pseudo/recall"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        values = [(line["iteration"], line[name]) for line in lines if name in line]
        assert written == [(step, pytest.approx(value)) for step, value in values]


def test_the_written_config_is_the_runs(first_run, shapes):
    written = merge_config(get_config(), str(first_run / CONFIG_NAME))
    assert written == tiny_config(shapes, first_run)


def test_checkpoint_of_an_earlier_run_is_not_overwritten(first_run, shapes):
    before = snapshot(first_run)
    args = Namespace(resume=False, eval_only=False, opts=[])
    with pytest.raises(InputError, match="is of an earlier run; continue it with --resume, or"):
        run(tiny_config(shapes, first_run), args)
    assert snapshot(first_run) == before


def test_nothing_is_trained_or_written_past_the_end(finished_run, found_as_truth, shapes):
    before, log = snapshot(finished_run), read_lines(finished_run)
    cfg = tiny_config(shapes, finished_run, "SSOD.DATA.VAL_JSON", found_as_truth)
    results = resume(cfg).train()
    assert snapshot(finished_run) == before
    assert differences({"iteration": MAX_ITER} | results, log[-1]) == []


@pytest.mark.parametrize(
    ("checkpoint_period", "what"),
    [(1, "the weights are not finite.*BASE_LR"), (0, "2 steps in a row were not finite.*BASE_LR")],
    ids=["save", "log"],
)
def test_infinite_initial_weights_stop_the_run_before_a_checkpoint(
    checkpoint_period, what, first_run, shapes, output, tmp_path
):
    state = {n[8:]: v for n, v in read_state(first_run)["model"].items() if n.startswith("teacher")}
    state["roi_heads.box_predictor.cls_score.bias"][1] = float("inf")
    torch.save(state, tmp_path / "infinite.pth")
    overrides = ("MODEL.WEIGHTS", tmp_path / "infinite.pth", *SUPERVISED)
    overrides += ("SSOD.MAX_SKIPPED_STEPS", 2)
    cfg = tiny_config(shapes, output, *overrides, "SOLVER.CHECKPOINT_PERIOD", checkpoint_period)
    with pytest.raises(InputError, match=f"iteration 1: .*{what}"):
        train(cfg)
    (tmp_path / "infinite.pth").unlink()
    assert not (output / CHECKPOINT_NAME).exists()


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(burn_in, shapes, output):
    shutil.copytree(burn_in, output)
    before = snapshot(output)[str(output / CHECKPOINT_NAME)]
    diverging = (
        "TEST.EVAL_PERIOD",
        0,
        "SOLVER.BASE_LR",
        1000,
        "SOLVER.STEPS",
        "[]",
        "SOLVER.WARMUP_ITERS",
        0,
        "SSOD.MAX_SKIPPED_STEPS",
        3,
    )
    cfg = tiny_config(shapes, output, *SUPERVISED, *diverging, "SOLVER.MAX_ITER", 12)
    with pytest.raises(InputError, match="not finite.* the last checkpoint is kept. Lower "):
        train(cfg, resumed=True)
    assert snapshot(output)[str(output / CHECKPOINT_NAME)] == before


@pytest.fixture
def broken(shapes, tmp_path):
    """Shapes set in which one unlabeled image cannot be decoded, and the path of that image."""
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    image = root / "images" / "unlabeled_000003.jpg"
    image.write_bytes(image.read_bytes()[:300])
    return root, image


def test_broken_unlabeled_image_is_reported_once(broken, output, caplog):
    root, image = broken
    # Every step after the burn-in draws each of the six images.
    overrides = ("SSOD.DATA.UNLABELED_PER_BATCH", 6)
    caplog.set_level(logging.WARNING)
    train(tiny_config(root, output, *overrides, "TEST.EVAL_PERIOD", 0))
    reports = [record.message for record in caplog.records if str(image) in record.message]
    assert len(reports) == 1 and "cannot be decoded" in reports[0]
    assert read_lines(output)[-1]["iteration"] == MAX_ITER
    assert "pseudo/recall" in read_lines(output)[-1]  # of the other images


def test_too_many_broken_images_stop_the_run(broken, output):
    root, image = broken
    many = ("SSOD.DATA.UNLABELED_PER_BATCH", 50, "INPUT.MIN_SIZE_TRAIN", "[32]")
    cfg = tiny_config(root, output, *TWO_STEPS, *many, "SSOD.BURN_IN_ITERS", 0)
    with pytest.raises(InputError, match=rf"of \d+ images drawn .* {image}.*MAX_FAILED_SHARE"):
        train(cfg)
    assert not (output / CHECKPOINT_NAME).exists()


def test_without_a_validation_set_there_is_no_evaluation(shapes, output):
    cfg = tiny_config(shapes, output, *TWO_STEPS)
    train(cfg)
    (line,) = read_lines(output)
    assert line["iteration"] == 2 and line["total_loss"] > 0
    assert resume(cfg).train() == {}
    assert not (output / "inference").exists()


@pytest.fixture
def lines(tmp_path):
    """Folder with a log of three lines."""
    log = MetricLog(tmp_path, 0)
    for iteration in (1, 2, 3):
        log.write(iteration, {"loss": float(iteration)})
    log.close()
    return tmp_path


def test_log_continues_after_a_line_that_was_cut_off(lines):
    path = lines / LOG_NAME
    path.write_text(path.read_text()[:-5])
    log = MetricLog(lines, 2)
    log.write(4, {"loss": 4.0})
    log.close()
    assert [line["iteration"] for line in read_metrics(lines)] == [1, 2, 4]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:-1", ""])
def test_device_that_is_not_there_is_refused(shapes, tmp_path, name):
    with pytest.raises(InputError, match=f"MODEL.DEVICE '{name}' cannot be used here; set it to"):
        usable_device(tiny_config(shapes, tmp_path, "MODEL.DEVICE", name))


def test_device_is_chosen(shapes, tmp_path):
    assert usable_device(tiny_config(shapes, tmp_path, "MODEL.DEVICE", "cpu")).type == "cpu"
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert usable_device(tiny_config(shapes, tmp_path, "MODEL.DEVICE", "auto")).type == best


def test_unknown_filter_is_refused_with_the_known_ones(shapes, tmp_path):
    with pytest.raises(InputError, match=r"one of \[.*'FixedThreshold'.*\], got 'Fixed'"):
        build_model(tiny_config(shapes, tmp_path, "SSOD.FILTER.NAME", "Fixed"))


def test_initial_weights_depend_on_the_seed_alone(shapes, tmp_path):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        model = build_model(tiny_config(shapes, tmp_path, "SEED", seed))
        states.append(dict(model.state_dict()))
    assert differences(states[0], states[1]) == []
    assert differences(states[0], states[2]) != []


def test_evaluation_that_an_interruption_cut_off_is_made_up_for(finished_run, shapes, output):
    expected = read_lines(finished_run)[-1]
    shutil.copytree(finished_run, output)
    path = output / LOG_NAME
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    written = (finished_run / CONFIG_NAME).read_text()
    val = next(line for line in written.splitlines() if "VAL_JSON" in line).split(": ")[1]
    train(tiny_config(shapes, output, "SSOD.DATA.VAL_JSON", val), resumed=True)
    assert differences(read_lines(output)[-1], expected) == []


def test_broken_validation_image_costs_no_training(shapes, output, tmp_path):
    truth = json.loads((shapes / "annotations" / "val.json").read_text())
    images = shutil.copytree(shapes / "images", tmp_path / "images")
    (images / truth["images"][0]["file_name"]).write_bytes(b"no image")
    overrides = ("SSOD.DATA.VAL_IMAGES", images, *SUPERVISED, "SOLVER.CHECKPOINT_PERIOD", 0)
    with pytest.raises(InputError, match=truth["images"][0]["file_name"]):
        train(tiny_config(shapes, output, *overrides))
    trainer = resume(tiny_config(shapes, output, *SUPERVISED))
    assert trainer.model.iteration == EVAL_PERIOD


def test_momentum_of_the_config_beats_that_of_the_checkpoint(first_run, shapes, output):
    shutil.copytree(first_run, output)
    trainer = resume(tiny_config(shapes, output, "SOLVER.MOMENTUM", 0.25))
    assert {group["momentum"] for group in trainer.step.optimizer.param_groups} == {0.25}


def test_gradients_are_clipped_to_their_norm(shapes, output):
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
    trained = Run(tiny_config(shapes, output, *clip, *TWO_STEPS, *SUPERVISED))
    trained.train()
    gradients = [p.grad for p in trained.model.student.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_mixed_precision_trains_close_to_fp32(shapes, output):
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        keys = ("SOLVER.AMP.ENABLED", dtype != "float32", "SSOD.LOG_PERIOD", 1, *TWO_STEPS)
        keys += ("SSOD.AMP_DTYPE", dtype) if dtype != "float32" else ()
        trained = Run(tiny_config(shapes, output / dtype, *keys, *SUPERVISED))
        trained.train()
        losses[dtype] = read_lines(output / dtype)[0]["loss_rpn_cls"]
        assert all(p.dtype == torch.float32 for p in trained.model.student.parameters())
        assert ("grad_scale" in read_lines(output / dtype)[0]) == (dtype == "float16")
    for dtype in ("bfloat16", "float16"):
        assert losses[dtype] == pytest.approx(losses["float32"], rel=0.05)
        assert losses[dtype] != losses["float32"]


def test_evaluation_needs_no_training_images_and_no_methods(finished_run, shapes, tmp_path):
    """Of a run with a second branch, as of one without."""
    lsm = ("SSOD.LSM.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", 0.05, *TWO_STEPS)
    train(tiny_config(shapes, tmp_path, *lsm))
    nowhere = ("SSOD.DATA.LABELED_JSON", "nowhere", "SSOD.DATA.UNLABELED_JSON", "nowhere")
    args = Namespace(resume=False, eval_only=True, opts=[])
    results = run(tiny_config(shapes, tmp_path, *nowhere), args)
    assert {"student/AP", "teacher/AP"} <= results.keys()
    with pytest.raises(InputError, match="--eval-only needs a validation set"):
        run(tiny_config(shapes, tmp_path, "SSOD.DATA.VAL_JSON", ""), args)
