import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ssod
from ssod.cli.train import build_parser, format_results, main
from ssod.hosts.metric_log import LOG_NAME
from ssod.hosts.protocol import CONFIG_NAME
from ssod.hosts.torchvision.run import CHECKPOINT_NAME
from tiny_run import MAX_ITER, read_lines, snapshot, tiny_options

SCRIPT = Path(ssod.__file__).parents[2] / "train_net.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns exit status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, args)])
        status = main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def options(shapes, tmp_path):
    """`KEY VALUE ...` of the tiny run in an empty folder."""
    yield tiny_options(shapes, tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # checkpoints are large


def _assert_one_line_error(result, *parts):
    status, out, err = result
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts)


def test_help_mentions_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--config-file FILE", "--resume", "--eval-only", "KEY VALUE"):
        assert option in text


DETECTRON2_ERROR = (
    ("command line: SEED must be in",)
    if find_spec("detectron2")
    else ("SSOD.HOST detectron2 needs the module detectron2", "uv sync --extra detectron2")
)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--config-file", "nowhere.yaml"), ("nowhere.yaml", "config file not found")),
        (("SOLVER.MAX_ITERS", "3"), ("unknown key SOLVER.MAX_ITERS", "SOLVER.MAX_ITER?")),
        (("SOLVER.MAX_ITER",), ("KEY VALUE pairs",)),
        (("SSOD.HOST", "detectron2", "SEED", "-1"), DETECTRON2_ERROR),
        (("--num-gpus", "2"), ("--num-gpus", "torchvision trains in one process")),
        (("SSOD.HOST", "keras"), ("SSOD.HOST must be", "'keras'")),
        (("SSOD.DATA.LABELED_JSON", "nowhere.json"), ("nowhere.json: annotation file not found",)),
        ((), ("SSOD.DATA.LABELED_JSON is empty",)),
    ],
    ids=["config", "key", "odd", "detectron2", "gpus", "host", "data", "no data"],
)
def test_bad_input_is_one_line_on_stderr(run, args, parts):
    _assert_one_line_error(run(*args), *parts)


def test_unknown_option_is_a_usage_error(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--evaluate-only")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("train_net.py: error: unrec")


def test_bad_input_of_the_real_script_is_one_line_without_a_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "--config-file", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    _assert_one_line_error((done.returncode, done.stdout, done.stderr), "nowhere.yaml")


def test_evaluation_prints_the_ap_of_the_log_and_changes_nothing(
    run, finished_run, found_as_truth, shapes
):
    before, logged = snapshot(finished_run), read_lines(finished_run)[-1]
    options = [*tiny_options(shapes, finished_run), "SSOD.DATA.VAL_JSON", found_as_truth]
    status, out, _ = run("--eval-only", *options)
    assert status == 0
    assert out == format_results(logged) + "\n"
    assert f"{logged['teacher/AP']:.1f}" in out
    assert snapshot(finished_run) == before
    assert {Path(name).name for name in before} >= {LOG_NAME, CONFIG_NAME, CHECKPOINT_NAME}


def test_evaluation_of_weights_starts_no_run(run, options, finished_run, found_as_truth, tmp_path):
    weights = ("MODEL.WEIGHTS", finished_run / CHECKPOINT_NAME)
    status, out, _ = run("--eval-only", *options, "SSOD.DATA.VAL_JSON", found_as_truth, *weights)
    assert status == 0
    assert out == format_results(read_lines(finished_run)[-1]) + "\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["inference"]


def test_evaluation_of_nothing_is_refused(run, options, tmp_path):
    result = run("--eval-only", *options)
    _assert_one_line_error(
        result, "--eval-only found no checkpoint", str(tmp_path / "run"), "WEIGHTS"
    )
    assert not (tmp_path / "run").exists()


def test_earlier_run_is_not_overwritten(run, finished_run, shapes):
    before = snapshot(finished_run)
    _assert_one_line_error(run(*tiny_options(shapes, finished_run)), CHECKPOINT_NAME, "--resume")
    assert snapshot(finished_run) == before


def test_training_from_a_file_and_resuming_it(run, options, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("_BASE_: base.yaml\nSOLVER:\n  MAX_ITER: 1\n")
    (tmp_path / "base.yaml").write_text("SEED: 3\nSOLVER:\n  MAX_ITER: 9\n")
    at = options.index("SOLVER.MAX_ITER")
    options = options[:at] + options[at + 2 :]  # the file's counts
    status, out, _ = run("--config-file", config, *options)
    assert (status, out.splitlines()[-1].split()[0]) == (0, "student")
    assert {line["iteration"] for line in read_lines(tmp_path / "run")} == {1}
    assert "SEED: 3" in (tmp_path / "run" / CONFIG_NAME).read_text()

    args = ("--resume", "--config-file", config, *options, "SOLVER.MAX_ITER", MAX_ITER - 2)
    status, out, _ = run(*args)
    assert status == 0
    assert [row.split()[0] for row in out.splitlines()[-2:]] == ["teacher", "student"]
    assert [line["iteration"] for line in read_lines(tmp_path / "run")] == [1, 1, 2, 3, 3]
