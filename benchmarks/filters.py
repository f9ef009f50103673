"""
Pseudo-label filters on Shapes: AP and the quality of pseudo-labels, over seeds.

All runs of a seed continue one burn-in, as in the quickstart. Interrupted, it continues.
Example: python benchmarks/filters.py --seeds 0 1 2 --output output/filters
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from fvcore.common.config import CfgNode

from ssod.cli.common import run_command
from ssod.cli.quickstart import data_keys
from ssod.cli.shapes import make_shapes
from ssod.config import merge_config
from ssod.data.shapes import ShapesSpec
from ssod.evaluation.report import format_table
from ssod.hosts.torchvision import experiment

FILTERS = {
    "control (no pseudo-labels)": ("SSOD.UNSUP_LOSS_WEIGHT", 0),
    "Fixed 0.5": ("SSOD.FILTER.SCORE_THRESH", 0.5),
    "Fixed 0.7": ("SSOD.FILTER.SCORE_THRESH", 0.7),
    "Fixed 0.9": ("SSOD.FILTER.SCORE_THRESH", 0.9),
    # 24 labeled images: the thresholds follow the teacher from one to the next evaluation.
    "ACT, queue": (
        *("SSOD.FILTER.NAME", "AdaptiveClassThreshold", "SSOD.FILTER.QUEUE_IMAGES", 512),
        *("SSOD.FILTER.REFRESH_PERIOD", 20),
    ),
    "SoftMatch": (*("SSOD.FILTER.NAME", "SoftMatchWeighting", "SSOD.FILTER.EMA_DECAY", 0.99),),
}
COLUMNS = ("filter", "AP", "gain", "precision", "by weight", "recall", "boxes/image", "KL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--config-file", default="configs/quickstart.yaml", metavar="FILE")
    parser.add_argument("--output", default="output/filters", metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    args = parser.parse_args()
    tables = [run_seed(args.config_file, Path(args.output), seed) for seed in args.seeds]
    print(format_table(summarize(tables), COLUMNS))
    print("\nprecision / recall of pseudo-labels at each evaluation, mean over seeds")
    for name in tables[0]:
        if name not in ("control (no pseudo-labels)",):
            steps = zip(*(table[name]["history"] for table in tables), strict=True)
            values = (f"{mean(p for p, _ in s):.2f} / {mean(r for _, r in s):.2f}" for s in steps)
            print(f"{name:12s}", "   ".join(values))


def run_seed(config: str, root: Path, seed: int) -> dict[str, dict]:
    """Return the results of each filter on one seed's images and initial weights."""
    output = root / f"seed_{seed}"
    shapes = output / "shapes"
    make_shapes(shapes, ShapesSpec(seed=seed))

    def configure(run: str, *extra: object) -> CfgNode:
        keys = [*data_keys(shapes), "SEED", seed, "OUTPUT_DIR", output / run]
        # More evaluations than the quickstart: how pseudo-labels change is what is asked.
        keys += ["TEST.EVAL_PERIOD", 150, *extra]
        cfg = merge_config(experiment.get_config(), config, [str(key) for key in keys])
        cfg.freeze()
        return cfg

    burn_in = configure("burn_in").SSOD.BURN_IN_ITERS
    control = FILTERS["control (no pseudo-labels)"]
    experiment.train(
        configure("burn_in", "SOLVER.MAX_ITER", burn_in, *control), f"seed {seed}: burn-in"
    )
    results = {}
    for name, overrides in FILTERS.items():
        run = name.replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
        experiment.branch(output / "burn_in", output / run)
        cfg = configure(run, *overrides)
        finished = experiment.train(cfg, f"seed {seed}: {name}")
        lines = [line for line in experiment.read_log(cfg) if "pseudo/precision" in line]
        lines = [line for line in lines if line["iteration"] > burn_in]
        results[name] = {
            "results": finished.results,
            "history": [(line["pseudo/precision"], line["pseudo/recall"]) for line in lines],
        }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    return results


def summarize(tables: list[dict[str, dict]]) -> list[dict[str, str]]:
    """Mean and spread over seeds; the gain is over the control of the same seed."""
    rows = []
    for name in FILTERS:
        results = [table[name]["results"] for table in tables]
        controls = [table["control (no pseudo-labels)"]["results"] for table in tables]
        gains = [r["teacher/AP"] - c["teacher/AP"] for r, c in zip(results, controls, strict=True)]
        row = {"filter": name, "AP": _spread([r["teacher/AP"] for r in results])}
        row |= dict.fromkeys(COLUMNS[2:], "")
        if name != "control (no pseudo-labels)":
            row["gain"] = _spread(gains, sign="+")
            for column, key in (
                ("precision", "pseudo/precision"),
                ("by weight", "pseudo/weighted_precision"),
                ("recall", "pseudo/recall"),
                ("boxes/image", "pseudo/boxes_per_image"),
                ("KL", "pseudo/class_kl"),
            ):
                row[column] = f"{mean(r[key] for r in results):.2f}"
        rows.append(row)
    return rows


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
