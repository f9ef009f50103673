import contextlib
import io
import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import ssod
from ssod.cli.main import main
from ssod.cli.quickstart import summarize
from ssod.data.shapes import ShapesSpec
from ssod.hosts.metric_log import LOG_NAME
from ssod.hosts.torchvision.run import CHECKPOINT_NAME
from tiny_run import BURN_IN_ITERS, MAX_ITER, OPTIONS, SPEC, differences, read_lines

SPEC_OPTIONS = {field.name: "--" + field.name.replace("_", "-") for field in fields(ShapesSpec)}
FEW_IMAGES = [
    str(item)
    for name, option in SPEC_OPTIONS.items()
    if name not in ("seed", "crowded")
    for item in (option, getattr(SPEC, name))
]
SHORT = [str(item) for pair in OPTIONS.items() for item in pair]


def _assert_one_line_error(captured, status, *parts):
    lines = captured.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and lines[-1] == errors[0]
    assert "Traceback" not in captured.err
    assert all(part in errors[0] for part in parts), errors[0]


@pytest.mark.parametrize(
    ("command", "mentioned"),
    [
        ([], ["quickstart", "shapes", "--version"]),
        (["shapes"], ["root", *SPEC_OPTIONS.values()]),
        (
            ["quickstart"],
            ["--config-file FILE", "--output DIR", "--seeds", "KEY VALUE"]
            + [option for name, option in SPEC_OPTIONS.items() if name not in ("seed", "crowded")],
        ),
    ],
    ids=["ssod", "shapes", "quickstart"],
)
def test_help_mentions_every_option(command, mentioned, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in mentioned if name not in text] == []


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ssod {ssod.__version__}\n"


@pytest.mark.parametrize("args", [[], ["train"], ["shapes"], ["shapes", "a", "--seed", "x"]])
def test_usage_error(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert ": error: " in capsys.readouterr().err.splitlines()[-1]


def test_shapes_are_written_once(tmp_path, capsys):
    args = ["shapes", str(tmp_path / "set"), *FEW_IMAGES, "--seed", "4"]
    assert main(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'set'}: written\n"
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*") if p.is_file()}
    images = [path.name for path in files if path.suffix == ".jpg"]
    assert len(images) == SPEC.num_labeled + SPEC.num_unlabeled + SPEC.num_val

    assert main(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'set'}: already there\n"
    assert {path: path.stat().st_mtime_ns for path in files} == files

    assert main([*args, "--seed", "5"]) == 0
    assert capsys.readouterr().out.endswith(": written\n")


def test_crowded_shapes(tmp_path):
    counts = ["--num-labeled", "2", "--num-unlabeled", "2", "--num-val", "2"]
    assert main(["shapes", str(tmp_path / "set"), *counts, "--crowded"]) == 0
    written = json.loads((tmp_path / "set" / "shapes.json").read_text())["spec"]
    assert (written["crowded"], written["max_objects"]) == (True, 13)
    val = json.loads((tmp_path / "set" / "annotations" / "val.json").read_text())
    assert len(val["categories"]) == 12


def test_bad_input_of_shapes_is_one_line(tmp_path, capsys):
    status = main(["shapes", str(tmp_path / "set"), "--num-val", "0"])
    _assert_one_line_error(capsys.readouterr(), status, "num_val", "at least 1, got 0")
    (tmp_path / "notes.txt").write_text("mine")
    status = main(["shapes", str(tmp_path)])
    _assert_one_line_error(capsys.readouterr(), status, "no Shapes set", "new or empty directory")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "out"
    yield output
    shutil.rmtree(output, ignore_errors=True)  # checkpoints are large


@pytest.fixture(scope="module")
def quickstart(output):
    """Run the quickstart with few images and iterations; returns status and stdout."""

    def run(*overrides, images=FEW_IMAGES):
        printed = io.StringIO()
        args = ["--config-file", "", "--output", str(output), *images, *SHORT, *overrides]
        with contextlib.redirect_stdout(printed):
            status = main(["quickstart", *args])
        return status, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def finished(quickstart, output):
    """Table, stdout and folder of a finished quickstart."""
    status, printed = quickstart()
    assert status == 0
    return json.loads((output / "results.json").read_text()), printed, output


def test_quickstart_prints_the_table_it_writes(finished):
    rows, printed, output = finished
    titles = [row["trained on Shapes"] for row in rows]
    assert titles == ["supervised", "supervised + EMA (control)", "semi-supervised"]
    for title, row in zip(titles, rows, strict=True):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{title}  "))
        assert f"{row['AP50']:.1f}" in line and f"{row['images/s']:.1f}" in line
        assert row["min"] > 0 and row["images/s"] > 0
    assert printed.endswith(f"report: {output / 'report.png'}\n")


def test_quickstart_draws_the_report(finished):
    *_, output = finished
    report = np.asarray(Image.open(output / "report.png").convert("L"))
    assert report.shape[1] == 1600 and report.std() > 10


def test_quickstart_takes_the_rows_from_the_ends_of_the_runs(finished):
    rows, _, output = finished
    models = (("supervised", "student"), ("supervised", "teacher"), ("semi_supervised", "teacher"))
    for row, (run, model) in zip(rows, models, strict=True):
        last = read_lines(output / run)[-1]
        assert last["iteration"] == MAX_ITER
        names = ("AP", "AP50", "AP_S", "AP_M", "AP_L")
        measured = {name: last[f"{model}/{name}"] for name in names}
        assert differences({name: row[name] for name in names}, measured) == []


def test_quickstart_runs_share_the_burn_in_and_part_after_it(finished):
    *_, output = finished
    runs = ("burn_in", "supervised", "semi_supervised")
    lines = {run: read_lines(output / run) for run in runs}
    count = len(lines["burn_in"])
    assert lines["burn_in"][-1]["iteration"] == BURN_IN_ITERS
    for run in runs:
        assert differences(lines[run][:count], lines["burn_in"]) == []
        unsupervised = any("loss_cls_unsup" in line for line in lines[run][count:])
        assert unsupervised == (run == "semi_supervised")


def test_second_quickstart_trains_nothing_and_gives_the_same_table(finished, quickstart):
    rows, printed, output = finished
    runs_and_data = [p for p in output.rglob("*") if p.suffix in (".pth", ".json", ".jpg")]
    kept = [p for p in runs_and_data if p.name != "results.json" and "inference" not in p.parts]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert {CHECKPOINT_NAME, LOG_NAME, "labeled_000001.jpg"} <= {path.name for path in kept}
    assert quickstart() == (0, printed)
    again = json.loads((output / "results.json").read_text())
    assert differences(again, rows) == []
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_quickstart_with_another_config_in_the_same_folder_is_refused(finished, quickstart, capsys):
    *_, output = finished
    results = (output / "results.json").read_text()
    status, _ = quickstart("SOLVER.BASE_LR", "0.5")
    written = str(output / "burn_in" / "config.yaml")
    _assert_one_line_error(capsys.readouterr(), status, written, "another config")
    assert (output / "results.json").read_text() == results


def test_quickstart_on_another_set_in_the_same_folder_is_refused(finished, quickstart, capsys):
    *_, output = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*.jpg"))
    status, _ = quickstart(images=[*FEW_IMAGES, "--max-objects", "2"])
    _assert_one_line_error(capsys.readouterr(), status, str(output), "another Shapes set")
    assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*.jpg")) == before


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--num-labeled", "0"], ["num_labeled", "at least 1, got 0"]),
        (["--config-file", "nowhere.yaml", *FEW_IMAGES], ["nowhere.yaml: config file not found"]),
        (["--config-file", "", *FEW_IMAGES, "SEED"], ["KEY VALUE pairs"]),
        (["--config-file", "", *FEW_IMAGES, "SOLVER.LR", "1"], ["unknown key SOLVER.LR"]),
        (["--config-file", "", "SSOD.BURN_IN_ITERS", "0"], ["BURN_IN_ITERS between 0 and"]),
        (["--config-file", "", "SOLVER.MAX_ITER", "9"], ["SOLVER.MAX_ITER 9, got 2000"]),
        (["--config-file", "", "OUTPUT_DIR", "x"], ["OUTPUT_DIR is", "use --output"]),
        (["--config-file", "", "SSOD.DATA.VAL_JSON", ""], ["VAL_JSON is", "use train_net.py"]),
    ],
    ids=["seeds", "spec", "config", "odd", "key", "burn-in", "end", "output", "data"],
)
def test_bad_input_of_quickstart_is_one_line(args, parts, tmp_path, capsys):
    status = main(["quickstart", "--output", str(tmp_path), *args])
    _assert_one_line_error(capsys.readouterr(), status, *parts)


def test_summary_over_seeds_by_hand():
    def table(*values):
        return [
            {name: value for name in ("AP", "AP50", "AP_S", "AP_M", "AP_L")} for value in values
        ]

    rows = summarize([table(10.0, 20.0, 30.0), table(14.0, 20.0, 36.0)])
    assert [row["trained on Shapes"] for row in rows] == [
        "supervised",
        "supervised + EMA (control)",
        "semi-supervised",
    ]
    assert [row["AP"] for row in rows] == ["12.0 ± 2.8", "20.0 ± 0.0", "33.0 ± 4.2"]
    assert [row["AP_L"] for row in rows] == [row["AP"] for row in rows]
    assert [row["gain in AP"] for row in rows] == ["-8.0 ± 2.8", "", "+13.0 ± 4.2"]
