import json
import logging
import re
import shutil

import pytest
import torch
from detectron2.engine import HookBase

from ssod.errors import InputError
from ssod.hosts.checkpoint import is_run_checkpoint, read_checkpoint
from ssod.hosts.detectron2.launch import format_results
from ssod.hosts.detectron2.run import Run, find_checkpoint
from ssod.hosts.metric_log import read_metrics
from tiny_detectron2 import tiny_config
from tiny_run import EVAL_PERIOD, MAX_ITER, differences

SUPERVISED = ("SSOD.UNSUP_LOSS_WEIGHT", 0)
NO_VAL = ("SSOD.DATA.VAL_JSON", "")
# What Detectron2 measures of time, and what it smooths over iterations before a resume.
UNSTABLE = re.compile(r"time|data_time|eta_seconds|rank_data_time|(unsup/)?(rpn|roi_head)/num_.*")


def _lines(output):
    lines = sorted(read_metrics(output), key=lambda line: line["iteration"])
    return [{k: v for k, v in line.items() if not UNSTABLE.fullmatch(k)} for line in lines]


def _stop_after(shapes, output, iterations, *overrides):
    """Leave the run as if it had been killed after so many iterations, past its checkpoint."""
    run = Run(tiny_config(shapes, output, *overrides))

    class Kill(HookBase):
        def before_step(self):
            if self.trainer.iter == iterations:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train([Kill()])


@pytest.fixture(scope="module")
def output(shapes, tmp_path_factory):
    """Folder of a finished run; not to be changed."""
    output = tmp_path_factory.mktemp("detectron2") / "run"
    Run(tiny_config(shapes, output, "SOLVER.CHECKPOINT_PERIOD", 1)).train()
    yield output
    shutil.rmtree(output)


@pytest.mark.parametrize("stop", [2, 4], ids=["end of the burn-in", "after it"])
def test_resumed_run_equals_an_uninterrupted_one(output, shapes, tmp_path, stop):
    _stop_after(shapes, tmp_path, stop, "SOLVER.CHECKPOINT_PERIOD", stop)
    checkpoint = find_checkpoint(str(tmp_path))
    assert checkpoint.endswith(f"model_{stop - 1:07d}.pth")
    resumed = Run(tiny_config(shapes, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1), checkpoint)
    assert resumed.model.iteration == stop
    resumed.train()
    states = [read_checkpoint(folder / "model_final.pth") for folder in (tmp_path, output)]
    for state in states:
        del state["config"]  # names the folder
    assert differences(*states) == []
    assert differences(_lines(tmp_path), _lines(output)) == []


def test_workers_and_two_parts_a_batch_change_no_draw(output, shapes, tmp_path):
    run = Run(tiny_config(shapes, tmp_path, "DATALOADER.NUM_WORKERS", 2, *NO_VAL))
    run.train()
    expected = read_checkpoint(output / "model_final.pth")["model"]
    assert differences(run.model.state_dict(), expected) == []


def test_evaluation_of_the_checkpoint_gives_what_the_log_says(output, shapes):
    results = Run(tiny_config(shapes, output), str(output / "model_final.pth")).evaluate()
    logged = read_metrics(output)[-1]
    assert logged["iteration"] == MAX_ITER - 1
    for model in ("student", "teacher"):
        for name, value in results[model]["bbox"].items():
            assert logged[f"{model}/bbox/{name}"] == pytest.approx(value, nan_ok=True)
    assert logged["bbox/AP"] == results["teacher"]["bbox"]["AP"]
    assert logged["pseudo/recall"] == results["pseudo/recall"]


def test_teacher_and_student_are_evaluated_once_the_teacher_has_started(shapes, tmp_path):
    keys = ("SSOD.BURN_IN_ITERS", EVAL_PERIOD + 1, "SOLVER.MAX_ITER", EVAL_PERIOD + 2)
    Run(tiny_config(shapes, tmp_path, *keys)).train()
    first, last = (line for line in read_metrics(tmp_path) if "bbox/AP" in line)
    assert first["iteration"] == EVAL_PERIOD - 1
    assert first["bbox/AP"] == first["student/bbox/AP"]
    assert "teacher/bbox/AP" not in first and "pseudo/precision" not in first
    assert last["bbox/AP"] == last["teacher/bbox/AP"]
    assert "student/bbox/AP" in last and "pseudo/precision" in last


def test_the_last_checkpoints_are_kept_also_over_a_resume(shapes, tmp_path):
    keys = ("SOLVER.CHECKPOINT_PERIOD", 1, "SSOD.CHECKPOINTS_TO_KEEP", 2, *NO_VAL, *SUPERVISED)
    _stop_after(shapes, tmp_path, 4, *keys)
    assert _checkpoints(tmp_path) == ["model_0000002.pth", "model_0000003.pth"]
    Run(tiny_config(shapes, tmp_path, *keys), find_checkpoint(str(tmp_path))).train()
    assert _checkpoints(tmp_path) == ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]


def _checkpoints(output):
    return sorted(path.name for path in output.glob("*.pth"))


def test_best_checkpoint_is_that_of_the_best_evaluation(output):
    best = max((line for line in read_metrics(output) if "bbox/AP" in line), key=_average_precision)
    state = read_checkpoint(output / "model_best.pth")["model"]
    assert state["_extra_state"].tolist()[0] == best["iteration"] + 1
    assert find_checkpoint(str(output)).endswith("model_final.pth")


def _average_precision(line):
    return line["bbox/AP"]


def test_best_value_of_an_earlier_start_counts(shapes, tmp_path):
    keys = ("TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 3, *SUPERVISED)
    _stop_after(shapes, tmp_path, 4, *keys)
    # As if the second evaluation had been better than any can be.
    path = tmp_path / "metrics.json"
    lines = read_metrics(tmp_path)
    for line in lines:
        if line["iteration"] == 1:
            line["bbox/AP"] = 101.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = (tmp_path / "model_best.pth").read_bytes()
    Run(tiny_config(shapes, tmp_path, *keys), find_checkpoint(str(tmp_path))).train()
    assert (tmp_path / "model_best.pth").read_bytes() == best


def test_best_value_that_a_kill_kept_from_the_log_counts(shapes, tmp_path):
    """The file is written at once, the log up to a period later."""
    host = ("SSOD.UNSUP_LOSS_WEIGHT", 0, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER")
    Run(tiny_config(shapes, tmp_path, *host, 1)).train()
    path = tmp_path / "model_best.pth"
    state = read_checkpoint(path)
    assert state["best"] == {"bbox/AP": read_metrics(tmp_path)[-1]["bbox/AP"]}
    torch.save(state | {"best": {"bbox/AP": 50.0}}, path)
    best = path.read_bytes()
    (tmp_path / "metrics.json").write_text("")
    Run(tiny_config(shapes, tmp_path, *host, 2), find_checkpoint(str(tmp_path))).train()
    assert path.read_bytes() == best


def test_save_that_is_cut_off_leaves_the_older_file(output, shapes, tmp_path, monkeypatch):
    run = Run(tiny_config(shapes, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1, *SUPERVISED, *NO_VAL))
    save = torch.save

    def cut_off(state, path):
        if run.model.iteration == 3:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    checkpoint = find_checkpoint(str(tmp_path))
    assert read_checkpoint(checkpoint)["model"]["_extra_state"].tolist() == [2, 1]


def test_a_finished_run_is_not_trained_but_what_was_lost_is_evaluated(output, shapes, tmp_path):
    folder = shutil.copytree(output, tmp_path / "copy")
    lines = read_metrics(folder)
    for keep in (lines, [line for line in lines if line["iteration"] < MAX_ITER - 1]):
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in keep))
        run = Run(tiny_config(shapes, folder), find_checkpoint(str(folder)))
        results = run.train()
        assert read_metrics(folder)[-1]["iteration"] == MAX_ITER - 1
        assert read_metrics(folder)[-1]["bbox/AP"] == results["bbox"]["AP"]
        assert len(read_metrics(folder)) == len(lines)


def test_what_is_left_of_a_training_follows_the_changed_config(output, shapes, tmp_path):
    checkpoint = str(output / "model_0000003.pth")
    keys = ("SOLVER.BASE_LR", 0.5, "SOLVER.MOMENTUM", 0.25, "SOLVER.MAX_ITER", MAX_ITER + 1)
    run = Run(tiny_config(shapes, tmp_path, *keys, *NO_VAL), checkpoint)
    groups = []

    class Look(HookBase):
        def before_step(self):
            groups.append(dict(self.trainer.optimizer.param_groups[0]))

    run.train([Look()])
    # A step of the schedule, at iteration 4, has divided it by ten.
    assert [group["lr"] for group in groups] == [pytest.approx(0.05)] * 2
    assert {group["momentum"] for group in groups} == {0.25}


def test_schedule_for_another_number_of_processes_is_not_continued(shapes, tmp_path):
    keys = ("SOLVER.MAX_ITER", 1, *SUPERVISED, *NO_VAL, "SOLVER.REFERENCE_WORLD_SIZE")
    Run(tiny_config(shapes, tmp_path, *keys, 1)).train()
    checkpoint = find_checkpoint(str(tmp_path))
    Run(tiny_config(shapes, tmp_path, *keys, 0), checkpoint)
    with pytest.raises(InputError, match="its schedule is for 1 processes, but there are 2"):
        Run(tiny_config(shapes, tmp_path, *keys, 2), checkpoint)


def test_nothing_is_evaluated_or_saved_after_a_failure_in_the_last_iteration(shapes, tmp_path):
    keys = ("SSOD.MAX_SKIPPED_STEPS", 1, "SSOD.LOG_PERIOD", MAX_ITER, "TEST.EVAL_PERIOD", 0)
    run = Run(tiny_config(shapes, tmp_path, *keys, *SUPERVISED))
    parameter = next(iter(run.model.student.roi_heads.parameters()))
    parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(InputError, match="steps in a row were not finite"):
        run.train()
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "inference").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        ("MODEL.RESNETS.NORM", "BatchNorm"),
        ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
    ],
)
def test_model_that_detectron2_cannot_build_is_one_line(shapes, tmp_path, key, value):
    with pytest.raises(InputError) as error:
        Run(tiny_config(shapes, tmp_path, key, value))
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_model_or_optimizer_is_refused(output, shapes, tmp_path):
    path = str(output / "model_final.pth")
    with pytest.raises(InputError, match="model_final.pth: checkpoint of another architecture"):
        Run(tiny_config(shapes, tmp_path, "MODEL.ROI_BOX_HEAD.FC_DIM", 16), path)
    with pytest.raises(InputError, match="does not fit: it is SGD, SSOD.OPTIMIZER asks for AdamW"):
        Run(tiny_config(shapes, tmp_path, "SSOD.OPTIMIZER", "AdamW"), path)
    torch.save({"model": {}}, tmp_path / "half.pth")
    with pytest.raises(InputError, match="half.pth: not a checkpoint of a run"):
        Run(tiny_config(shapes, tmp_path), str(tmp_path / "half.pth"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SSOD.ACCUMULATE_STEPS", 4), r"IMS_PER_BATCH must be a multiple of .* 1 x 4, got 2"),
        (("SOLVER.CHECKPOINT_PERIOD", 0), "CHECKPOINT_PERIOD must be at least 1, got 0"),
        (("INPUT.CROP.ENABLED", True), "INPUT.CROP.ENABLED must be False, got True"),
        (("SSOD.EVAL_MODEL", "ema"), "SSOD.EVAL_MODEL must be 'teacher' or 'student', got 'ema'"),
        (("SSOD.AMP_DTYPE", "int8"), "SSOD.AMP_DTYPE must be .*, got 'int8'"),
        (("MODEL.DEVICE", "cuda:99"), "MODEL.DEVICE 'cuda:99' cannot be used here"),
        (("MODEL.WEIGHTS", "nowhere.pth"), "nowhere.pth"),
    ],
)
def test_config_that_cannot_work_is_refused_before_training(shapes, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        Run(tiny_config(shapes, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        (("NAME", "AdaptiveClassThreshold"), "pseudo/reliable_thresh"),
        (("NAME", "AdaptiveClassThreshold", "SOURCE", "sweep"), "pseudo/reliable_thresh"),
        (("NAME", "SoftMatchWeighting", "POOL_FLOOR", 0.0), "pseudo/running_mean"),
        (("NAME", "GaussianMixtureThreshold"), "pseudo/reliable_thresh"),
    ],
    ids=["queue", "sweep", "soft", "gmm"],
)
def test_every_filter_trains(shapes, tmp_path, keys, state):
    overrides = [f"SSOD.FILTER.{k}" if i % 2 == 0 else k for i, k in enumerate(keys)]
    Run(tiny_config(shapes, tmp_path, *overrides, *NO_VAL)).train()
    values = [line[state] for line in read_metrics(tmp_path) if state in line]
    assert len(values) == 2 and all(0 < value < 1 for value in values)
    # Another filter takes over.
    resumed = Run(tiny_config(shapes, tmp_path), find_checkpoint(str(tmp_path)))
    assert type(resumed.model.pseudo_label_filter).__name__ == "FixedThreshold"
    assert resumed.model.iteration == MAX_ITER


def test_weights_of_a_run_start_another(output, shapes, tmp_path):
    path = output / "model_final.pth"
    assert is_run_checkpoint(str(path))
    run = Run(tiny_config(shapes, tmp_path, "MODEL.WEIGHTS", path))
    teacher = read_checkpoint(path)["model"]["teacher.backbone.fpn_lateral2.weight"]
    for detector in (run.model.student, run.model.teacher):
        assert torch.equal(detector.backbone.fpn_lateral2.weight, teacher)
    assert run.model.iteration == 0


def test_an_input_error_is_not_logged_with_a_traceback(shapes, tmp_path, caplog):
    keys = ("SOLVER.BASE_LR", 1000, "SSOD.MAX_SKIPPED_STEPS", 1, "SSOD.LOG_PERIOD", 1)
    keys += ("SOLVER.MAX_ITER", 20, *SUPERVISED, *NO_VAL, "SOLVER.WARMUP_ITERS", 0)
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(InputError, match=r"iteration \d+: Predicted boxes .* Inf/NaN.*\.jpg"),
    ):
        Run(tiny_config(shapes, tmp_path, *keys)).train()
    assert [record for record in caplog.records if record.exc_info] == []


def test_results_are_a_table_of_models_and_measures():
    results = {
        "bbox": {"AP": 1.0},
        "student": {"bbox": {"AP": 1.0, "APs": 2.0, "AP-cat": 9.0}},
        "teacher": {"voc": {"AP": 3.0}, "coco": {"AP": 4.0, "APs": 5.0}},
        "pseudo/recall": 0.5,
    }
    rows = [line.split() for line in format_results(results).splitlines()]
    assert rows[0] == ["model", "measure", "AP", "APs"]
    assert [row[:3] for row in rows[2:]] == [
        ["teacher", "voc", "3.0"],
        ["teacher", "coco", "4.0"],
        ["student", "bbox", "1.0"],
    ]
