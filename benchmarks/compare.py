"""
Configs compared on Shapes: AP and the quality of pseudo-labels, over seeds.

All runs of a seed start from the weights of one burn-in, the first config's, as does the control,
which is that config without unlabeled images but with the EMA. The optimizer and the warm-up of the
learning rate start anew there. Interrupted, it continues. Example:
python benchmarks/compare.py configs/shapes/mean_teacher.yaml configs/shapes/lsm.yaml

With `--own-data` the images are those that the configs name, with a split of each seed by
`SSOD.DATA.PERCENT`. The ceiling is the first config trained on all labels and nothing else, as long
as the others; what a config gains is also given as a share of what the ceiling does.

AP .001 is of boxes with a score above 0.001, the others' is MODEL.ROI_HEADS.SCORE_THRESH_TEST.
AP head and AP tail are means over a third of the classes: those with the most and with the fewest
labeled boxes of the seed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev

from fvcore.common.config import CfgNode

from ssod.cli.common import import_host, run_command
from ssod.cli.quickstart import data_keys
from ssod.cli.shapes import make_shapes
from ssod.config import merge_config, read_host
from ssod.data.shapes import ShapesSpec
from ssod.evaluation.coco_metrics import LOW_FLOOR_AP
from ssod.evaluation.report import format_table
from ssod.hosts.protocol import FinishedRun

CONTROL = "control"
CEILING = "ceiling"
RESERVED = (CONTROL, CEILING, "burn_in", "shapes")  # folders of a seed
NO_UNLABELED = ("SSOD.UNSUP_LOSS_WEIGHT", 0)
QUALITY = {
    "precision": "pseudo/precision",
    "by weight": "pseudo/weighted_precision",
    "recall": "pseudo/recall",
    "recall tail": "pseudo/recall_tail",
    "boxes/image": "pseudo/boxes_per_image",
    "KL": "pseudo/class_kl",
}
METRICS = {
    "AP": "teacher/AP",
    "AP .001": f"teacher/{LOW_FLOOR_AP}",
    **{name: f"teacher/{name}" for name in ("AP50", "AP75", "AP_S", "AP_M", "AP_L")},
    "AR100": "teacher/AR100",  # Detectron2 does not measure it
    "AP head": "AP_head",
    "AP tail": "AP_tail",
}
COLUMNS = ("config", *METRICS, "gain in AP", "gain of each seed", "share of ceiling", *QUALITY)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="FILE", help="YAML configs of one host")
    parser.add_argument("--output", default="output/compare", metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--max-foreign", type=int, default=0, metavar="N", help="as of `ssod shapes`"
    )
    parser.add_argument("--crowded", action="store_true", help="as of `ssod shapes`")
    parser.add_argument("--own-data", action="store_true", help="images of the configs, not Shapes")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="for all configs"
    )
    args = parser.parse_args()
    names = [Path(config).stem for config in args.configs]
    if len({*names, *RESERVED}) < len(names) + len(RESERVED):
        parser.error(f"configs need different names, other than {RESERVED}, got {names}")
    root = Path(args.output)
    specs = [
        ShapesSpec(seed=seed, max_foreign=args.max_foreign, crowded=args.crowded)
        for seed in args.seeds
    ]
    tables = [run_seed(args.configs, root, spec, args.opts, args.own_data) for spec in specs]
    print(format_table(summarize(tables), COLUMNS))
    print("\nprecision / recall of pseudo-labels at each evaluation, mean over seeds")
    for name in (name for name in tables[0] if tables[0][name]["history"]):
        steps = zip(*(table[name]["history"] for table in tables), strict=True)
        values = (f"{mean(p for p, _ in s):.2f} / {mean(r for _, r in s):.2f}" for s in steps)
        print(f"{name:16s}", "   ".join(values))


def make_data(output: Path, spec: ShapesSpec) -> list[object]:
    """Make the Shapes images of a seed; returns the keys that name them."""
    # A folder of its own: runs on other images are then of another config, and are not continued.
    kind = f"_foreign_{spec.max_foreign}" if spec.max_foreign else "_crowded" * spec.crowded
    shapes = output / f"shapes{kind}"
    make_shapes(shapes, spec)
    return [*data_keys(shapes), "MODEL.ROI_HEADS.NUM_CLASSES", len(spec.class_names)]


def run_seed(
    configs: list[str], root: Path, spec: ShapesSpec, opts: list[str], own_data: bool
) -> dict[str, dict]:
    """Return the results of each config on one seed's images and initial weights."""
    seed = spec.seed
    output = root / f"seed_{seed}"
    data = ["SSOD.DATA.SPLIT_SEED", seed] if own_data else make_data(output, spec)
    host = import_host(read_host(configs[0], opts))

    def configure(config: str, run: str, *extra: object) -> CfgNode:
        keys = [*data, "SEED", seed, "OUTPUT_DIR", output / run, *opts, *extra]
        cfg = merge_config(host.get_config(), config, [str(key) for key in keys])
        cfg.freeze()
        return cfg

    first = configure(configs[0], "")
    burn_in, total = first.SSOD.BURN_IN_ITERS, first.SOLVER.MAX_ITER
    host.train(
        configure(configs[0], "burn_in", "SOLVER.MAX_ITER", burn_in, *NO_UNLABELED),
        f"seed {seed}: burn-in",
    )
    start = ("MODEL.WEIGHTS", host.last_checkpoint(output / "burn_in"), "SSOD.BURN_IN_ITERS", 0)
    start += ("SOLVER.MAX_ITER", total - burn_in)
    rows = [(CONTROL, configs[0], (*start, *NO_UNLABELED))]
    if own_data:
        rows.append((CEILING, configs[0], (*NO_UNLABELED, "SSOD.DATA.PERCENT", 0)))
    rows += [(Path(config).stem, config, start) for config in configs]
    results = {}
    for name, config, extra in rows:
        cfg = configure(config, name, *extra)
        finished = host.train(cfg, f"seed {seed}: {name}")
        lines = [line for line in host.read_log(cfg) if "pseudo/precision" in line]
        results[name] = {
            "results": finished.results | head_and_tail(finished),
            "history": [(line["pseudo/precision"], line["pseudo/recall"]) for line in lines],
        }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    return results


def head_and_tail(finished: FinishedRun) -> dict[str, float]:
    """Mean AP of the third of the classes with the most labeled boxes, and with the fewest."""
    labeled, results = finished.data.labeled, finished.results
    order = (-labeled.class_counts).argsort(kind="stable")
    aps = [results[f"teacher/AP-{labeled.class_names[label]}"] for label in order]
    third = max(len(aps) // 3, 1)
    return {"AP_head": mean(aps[:third]), "AP_tail": mean(aps[-third:])}


def summarize(tables: list[dict[str, dict]]) -> list[dict[str, str]]:
    """Mean and spread over seeds; the gain is over the control of the same seed."""
    rows = []
    for name in tables[0]:
        results = [table[name]["results"] for table in tables]
        controls = [table[CONTROL]["results"] for table in tables]
        gains = [r["teacher/AP"] - c["teacher/AP"] for r, c in zip(results, controls, strict=True)]
        row = dict.fromkeys(COLUMNS, "") | {"config": name}
        found = {c: key for c, key in METRICS.items() if all(key in r for r in results)}
        row |= {column: _spread([r[key] for r in results]) for column, key in found.items()}
        if name != CONTROL:
            row["gain in AP"] = _spread(gains, sign="+")
            row["gain of each seed"] = ", ".join(f"{gain:+.1f}" for gain in gains)
            if CEILING in tables[0]:
                best = mean(table[CEILING]["results"]["teacher/AP"] for table in tables)
                way = best - mean(c["teacher/AP"] for c in controls)
                row["share of ceiling"] = f"{mean(gains) / way:.2f}" if way > 0 else "-"
            found = {column: key for column, key in QUALITY.items() if key in results[0]}
            row |= {c: f"{mean(r[key] for r in results):.2f}" for c, key in found.items()}
        rows.append(row)
    return rows


def _spread(values: list[float], sign: str = "") -> str:
    if not all(map(math.isfinite, values)):  # of objects that no image has
        return "-"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
