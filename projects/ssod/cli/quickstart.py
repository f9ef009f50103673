"""`ssod quickstart`: the whole experiment on synthetic data, with a table and a picture."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from fvcore.common.config import CfgNode

from ssod.cli.common import add_config_arguments, import_host
from ssod.cli.shapes import add_spec_arguments, make_shapes, read_spec
from ssod.config import merge_config, read_host
from ssod.core.structures import Detections, PseudoLabels
from ssod.data.datasets import ImageRecord
from ssod.data.images import read_image
from ssod.data.shapes import ShapesSpec
from ssod.errors import InputError
from ssod.evaluation.report import Curve, Panel, draw_report, format_table
from ssod.hosts.inference import find, label_images
from ssod.hosts.protocol import FinishedRun

logger = logging.getLogger(__name__)

# Row of the table, run it is read from, and which of the run's two models.
ROWS = (
    ("supervised", "supervised", "student"),
    ("supervised + EMA (control)", "supervised", "teacher"),
    ("semi-supervised", "semi_supervised", "teacher"),
)
METRICS = ("AP", "AP50", "AP_S", "AP_M", "AP_L")
COLUMNS = ("trained on Shapes", *METRICS, "min", "images/s")
STATE = (  # of the metrics `pseudo/...`, those that show what filter and methods do
    *("mean_weight", "mean_score", "reliable_thresh", "uncertain_thresh"),
    *("running_mean", "running_var", "class_kl", "mined_per_image"),
    *("daso_prototype_cosine", "daso_changed", "daso_class_kl"),
    *("contrast_gap", "contrast_other_class_cosine"),
    *("background_weight", "stable_per_image", "box_consistency"),
)
RIGHT = ("kl", "per_image")  # ends of names of what is on an axis of its own: no share of 1
SHOWN_SCORE = 0.5  # predictions below it are left out of the picture
Row = dict[str, str | float]
Log = list[dict[str, float]]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "quickstart",
        help="make the Shapes set, train three ways, print a table and draw a report",
        description="Make the synthetic Shapes set, then train supervised, supervised with the "
        "same EMA (the control), and semi-supervised from one common burn-in. Interrupted, it "
        "continues where it was.",
    )
    add_config_arguments(
        parser, default="configs/quickstart.yaml", help="YAML config (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        default="output/quickstart",
        metavar="DIR",
        help="folder for data, runs and report (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="repeat with so many seeds (other data, other weights); reports mean and spread",
    )
    add_spec_arguments(parser, leave_out=("seed", "crowded"))
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Run the experiment for each seed and print the tables."""
    if args.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {args.seeds}")
    root = Path(args.output)
    tables = []
    for seed in range(args.seeds):
        output = root if args.seeds == 1 else root / f"seed_{seed}"
        spec = replace(read_spec(args), seed=seed)
        tables.append(run_experiment(args.config_file, args.opts, output, spec))
        print(f"\n{format_table(tables[-1], COLUMNS)}\n")
        print(f"report: {output / 'report.png'}")
    if args.seeds > 1:
        print(f"\nmean and standard deviation over {args.seeds} seeds")
        print(format_table(summarize(tables), [COLUMNS[0], *METRICS, "gain in AP"]))


def run_experiment(config: str, opts: Sequence[str], output: Path, spec: ShapesSpec) -> list[Row]:
    """Train the three rows of one seed, draw `report.png` and return the table."""
    shapes = output / "shapes"
    files = data_keys(shapes)
    reserved = {"OUTPUT_DIR": "--output"} | dict.fromkeys(files[::2], "train_net.py")
    for key in opts[::2]:
        if key in reserved:
            raise InputError(f"{key} is the quickstart's own; use {reserved[key]} instead")

    host = import_host(read_host(config, opts))

    def configure(run: str, *extra: str | int) -> CfgNode:
        keys = files + ["SEED", spec.seed, "OUTPUT_DIR", output / run, *opts, *extra]
        cfg = merge_config(host.get_config(), config, [str(key) for key in keys])
        cfg.freeze()
        return cfg

    cfg = configure("")
    burn_in_iters = cfg.SSOD.BURN_IN_ITERS
    if not 0 < burn_in_iters < cfg.SOLVER.MAX_ITER:
        raise InputError(
            f"the quickstart needs SSOD.BURN_IN_ITERS between 0 and SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER}, got {burn_in_iters}"
        )
    _check_spec(output, spec)
    make_shapes(shapes, spec)
    no_unlabeled = ("SSOD.UNSUP_LOSS_WEIGHT", 0)
    host.train(configure("burn_in", "SOLVER.MAX_ITER", burn_in_iters, *no_unlabeled), "1/3 burn-in")
    # Both runs continue from the same weights, optimizer and position in the labeled data.
    for run in ("supervised", "semi_supervised"):
        host.branch(output / "burn_in", output / run)
    configs = {
        "supervised": configure("supervised", *no_unlabeled),
        "semi_supervised": configure("semi_supervised"),
    }
    control = host.train(configs["supervised"], "2/3 supervised")
    finished = host.train(configs["semi_supervised"], "3/3 semi-supervised")
    results = {"supervised": control.results, "semi_supervised": finished.results}
    logs = {run: host.read_log(configs[run]) for run in configs}
    rows = [
        {COLUMNS[0]: title}
        | {name: results[run][f"{model}/{name}"] for name in METRICS}
        | _speed(logs[run], configs[run])
        for title, run, model in ROWS
    ]
    (output / "results.json").write_text(json.dumps(rows, indent=1))
    _draw(output, configs["semi_supervised"], finished, logs, rows)
    return rows


def _check_spec(output: Path, spec: ShapesSpec) -> None:
    """Refuse to continue runs on other images."""
    written = output / "shapes.json"
    text = json.dumps(spec.to_dict())
    if written.exists() and written.read_text() != text:
        raise InputError(
            f"{output} holds a quickstart on another Shapes set {written.read_text()}; remove it "
            "or choose another --output"
        )
    if not written.exists():
        output.mkdir(parents=True, exist_ok=True)
        written.write_text(text)


def summarize(tables: list[list[Row]]) -> list[Row]:
    """Mean and standard deviation of each row over seeds, and the gain over the control."""
    summary = []
    for index, (title, *_) in enumerate(ROWS):
        row: Row = {COLUMNS[0]: title}
        for name in METRICS:
            row[name] = _mean_std([table[index][name] for table in tables])
        gains = [table[index]["AP"] - table[1]["AP"] for table in tables]
        row["gain in AP"] = "" if index == 1 else _mean_std(gains, sign="+")
        summary.append(row)
    return summary


def _mean_std(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.1f} ± {stdev(values):.1f}"


def data_keys(shapes: Path) -> list[str | Path]:
    """Return `KEY, VALUE, ...` that name the files of a Shapes set."""
    keys: list[str | Path] = []
    for group in ("LABELED", "UNLABELED", "VAL"):
        keys += [f"SSOD.DATA.{group}_JSON", shapes / "annotations" / f"{group.lower()}.json"]
        keys += [f"SSOD.DATA.{group}_IMAGES", shapes / "images"]
    truth = shapes / "annotations" / "unlabeled_truth.json"
    return [*keys, "SSOD.DATA.UNLABELED_TRUTH_JSON", truth]


def _speed(log: Log, cfg: CfgNode) -> dict[str, float]:
    """Training time without evaluation, and images read a second once the burn-in is over."""
    steps = [line for line in log if "time/step" in line]
    seconds = np.array([line["time/step"] for line in steps])
    iterations = np.diff([line["iteration"] for line in steps], prepend=0)
    after = [line["time/step"] for line in steps if line["iteration"] > cfg.SSOD.BURN_IN_ITERS]
    unlabeled = cfg.SSOD.DATA.UNLABELED_PER_BATCH if cfg.SSOD.UNSUP_LOSS_WEIGHT else 0
    images = cfg.SOLVER.IMS_PER_BATCH + unlabeled
    return {"min": float(seconds @ iterations) / 60, "images/s": images / mean(after)}


def _draw(
    output: Path,
    cfg: CfgNode,
    run: FinishedRun,
    logs: dict[str, Log],
    rows: list[Row],
) -> None:
    data = run.data
    val = data.val.select(data.val.image_ids[:12])
    unlabeled = data.hidden_truth.select(data.hidden_truth.image_ids[:6])
    draw_report(
        output / "report.png",
        title=f"Shapes: {len(data.labeled)} labeled + {len(data.unlabeled)} unlabeled images, "
        f"{cfg.SOLVER.MAX_ITER} iterations",
        class_names=data.labeled.class_names,
        validation=[
            _panel(record, found[found.scores >= SHOWN_SCORE])
            for record, found in find(run.model.teacher, val, cfg, run.device)
        ],
        unlabeled=[
            _panel(record, found[found.reliable], ", pseudo-boxes")
            for record, found in label_images(run.model, unlabeled, cfg, run.device)
        ],
        curves=_curves(logs),
        burn_in_iters=cfg.SSOD.BURN_IN_ITERS,
        rows=rows,
        columns=COLUMNS,
    )


def _panel(record: ImageRecord, found: Detections | PseudoLabels, what: str = "") -> Panel:
    return Panel(
        read_image(record.file_name),
        *(found.boxes.numpy(), found.classes.numpy(), found.scores.numpy()),
        *(record.boxes, record.classes),
        f"image {record.image_id}{what}",
    )


def _curves(lines: dict[str, Log]) -> dict[str, list[Curve]]:
    def curve(label: str, run: str, *keys: str, right: bool = False) -> Curve:
        chosen = [line for line in lines[run] if all(key in line for key in keys)]
        values = [sum(line[key] for key in keys) for line in chosen]
        return Curve(label, [line["iteration"] for line in chosen], values, right)

    ssl = "semi_supervised"
    # What there is depends on the filter and the methods.
    state = [key for key in STATE if any(f"pseudo/{key}" in line for line in lines[ssl])]
    return {
        "Validation AP": [curve(title, run, f"{model}/AP") for title, run, model in ROWS],
        "Pseudo-labels on unlabeled images": [
            curve("precision", ssl, "pseudo/precision"),
            curve("recall", ssl, "pseudo/recall"),
            curve("recall of rare classes", ssl, "pseudo/recall_tail"),
            curve("boxes per image", ssl, "pseudo/boxes_per_image", right=True),
            curve("true boxes per image", ssl, "pseudo/true_boxes_per_image", right=True),
        ],
        "Filter and methods": [
            curve(key.replace("_", " "), ssl, f"pseudo/{key}", right=key.endswith(RIGHT))
            for key in state
        ],
        "Classification losses": [
            curve("labeled", ssl, "loss_cls", "loss_rpn_cls"),
            curve("unlabeled", ssl, "loss_cls_unsup", "loss_rpn_cls_unsup"),
        ],
    }
