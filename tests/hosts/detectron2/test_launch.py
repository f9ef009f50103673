import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssod.cli.train import main
from ssod.config import _leaves
from ssod.hosts.detectron2.defaults import get_config
from ssod.hosts.metric_log import read_metrics
from tiny_detectron2 import tiny_config
from tiny_run import MAX_ITER

TRAIN_NET = Path(__file__).parents[3] / "train_net.py"


def _options(shapes, output, *overrides):
    """`KEY VALUE ...` of the tiny run, as on a command line."""
    default = dict(_leaves(get_config()))
    cfg = dict(_leaves(tiny_config(shapes, output, *overrides)))
    changed = {key: value for key, value in cfg.items() if value != default[key]}
    return [str(item) for pair in ({"SSOD.HOST": "detectron2"} | changed).items() for item in pair]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, args)])
        status = main()
        return status, *capsys.readouterr()

    return run


def _program(*args, launcher=(sys.executable,)):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, TRAIN_NET, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def _table(out):
    return [line.split() for line in out.splitlines() if line.startswith(("teacher ", "student "))]


def test_training_then_resuming_then_evaluating(run, shapes, tmp_path):
    options = _options(shapes, tmp_path, "SOLVER.MAX_ITER", MAX_ITER - 2)
    status, out, _ = run(*options)
    assert status == 0
    assert [row[:2] for row in _table(out)] == [["teacher", "bbox"], ["student", "bbox"]]
    assert (tmp_path / "config.yaml").exists()

    status, out, err = run(*options)
    assert (status, out) == (2, "")
    assert "is of an earlier run; continue it with --resume" in err.splitlines()[-1]

    other = ("SSOD.FILTER.NAME", "AdaptiveClassThreshold")
    status, trained, _ = run("--resume", *_options(shapes, tmp_path, *other))
    assert status == 0
    log = (tmp_path / "log.txt").read_text()
    for message in ("labeled images with", "is at iteration 3", "the one set starts anew"):
        assert message in log
    assert max(line["iteration"] for line in read_metrics(tmp_path)) == MAX_ITER - 1

    for args in (
        (),
        ("MODEL.WEIGHTS", tmp_path / "model_final.pth", "OUTPUT_DIR", tmp_path / "other"),
    ):
        # Neither the training images nor as many processes are needed.
        keys = ("SSOD.DATA.LABELED_JSON", "gone.json", "SOLVER.REFERENCE_WORLD_SIZE", 2, *other)
        status, out, _ = run("--eval-only", *_options(shapes, tmp_path, *keys), *args)
        assert status == 0
        assert _table(out) == _table(trained)


def test_refused_resume_leaves_the_config_of_the_run(run, shapes, tmp_path):
    keys = ("SOLVER.MAX_ITER", 1, "SSOD.DATA.VAL_JSON", "", "SSOD.UNSUP_LOSS_WEIGHT", 0)
    assert run(*_options(shapes, tmp_path, *keys))[0] == 0
    before = (tmp_path / "config.yaml").read_text()
    options = _options(shapes, tmp_path, *keys, "MODEL.ROI_BOX_HEAD.FC_DIM", 8)
    assert run("--resume", *options)[0] == 2
    assert (tmp_path / "config.yaml").read_text() == before


def test_expected_results_are_verified(run, shapes, tmp_path):
    keys = ("SOLVER.MAX_ITER", 1, "SSOD.UNSUP_LOSS_WEIGHT", 0, "TEST.EXPECTED_RESULTS")
    assert run(*_options(shapes, tmp_path, *keys, [["bbox", "AP", 0.0, 100.0]]))[0] == 0
    for args in (("--resume",), ("--eval-only",)):
        with pytest.raises(SystemExit) as stop:
            run(*args, *_options(shapes, tmp_path, *keys, [["bbox", "AP", 250.0, 1.0]]))
        assert stop.value.code == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--eval-only",), "--eval-only found no checkpoint in "),
        (("--num-gpus", "0"), "--num-gpus must be at least 1"),
        (("--num-machines", "2"), "--num-machines above 1 needs --dist-url"),
    ],
)
def test_bad_arguments_are_one_line(run, shapes, tmp_path, args, message):
    status, out, err = run(*args, *_options(shapes, tmp_path))
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {message}")


def test_bad_input_of_several_processes_is_one_line(shapes, tmp_path):
    options = _options(shapes, tmp_path, "SSOD.DATA.LABELED_JSON", "nowhere.json")
    done = _program("--num-gpus", 2, *options)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    assert "Traceback" not in done.stderr and "nowhere.json" in errors[0]


def test_torchrun_starts_what_the_config_scales_to(shapes, tmp_path):
    """Twice the batch and learning rate in half the iterations, and one log."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    keys = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 2 * MAX_ITER, "SOLVER.STEPS", [])
    done = _program(*_options(shapes, tmp_path, *keys), launcher=torchrun)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row[0] for row in _table(done.stdout)] == ["teacher", "student"]
    lines = read_metrics(tmp_path)
    assert max(line["iteration"] for line in lines) == MAX_ITER - 1
    assert max(line.get("lr", 0) for line in lines) == pytest.approx(0.02)
    assert any("pseudo/recall" in line for line in lines)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]["_extra_state"]
    assert state.tolist() == [MAX_ITER, 1]
    for name in ("log.txt", "log.txt.rank1"):  # also what is said before there is a folder
        assert "6 labeled images with" in (tmp_path / name).read_text(), name
