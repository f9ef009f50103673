"""
Configs compared on Shapes: AP and the quality of pseudo-labels, over seeds.

All runs of a seed start from the weights of one burn-in, the first config's, as does the control,
which is that config without unlabeled images but with the EMA. The optimizer and the warm-up of the
learning rate start anew there. Interrupted, it continues. Example:
python benchmarks/compare.py configs/shapes/mean_teacher.yaml configs/shapes/lsm.yaml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from fvcore.common.config import CfgNode

from ssod.cli.common import import_host, run_command
from ssod.cli.quickstart import data_keys
from ssod.cli.shapes import make_shapes
from ssod.config import merge_config, read_host
from ssod.data.shapes import ShapesSpec
from ssod.evaluation.report import format_table

CONTROL = "control"
RESERVED = (CONTROL, "burn_in", "shapes")  # folders of a seed
NO_UNLABELED = ("SSOD.UNSUP_LOSS_WEIGHT", 0)
QUALITY = {
    "precision": "pseudo/precision",
    "by weight": "pseudo/weighted_precision",
    "recall": "pseudo/recall",
    "boxes/image": "pseudo/boxes_per_image",
    "KL": "pseudo/class_kl",
}
METRICS = ("AP", "AP_S", "AP_M", "AP_L", "AR100")  # Detectron2 does not measure the last one
COLUMNS = ("config", *METRICS, "gain in AP", "gain of each seed", *QUALITY)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="FILE", help="YAML configs of one host")
    parser.add_argument("--output", default="output/compare", metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="for all configs"
    )
    args = parser.parse_args()
    names = [Path(config).stem for config in args.configs]
    if len({*names, *RESERVED}) < len(names) + len(RESERVED):
        parser.error(f"configs need different names, other than {RESERVED}, got {names}")
    tables = [run_seed(args.configs, Path(args.output), seed, args.opts) for seed in args.seeds]
    print(format_table(summarize(tables), COLUMNS))
    print("\nprecision / recall of pseudo-labels at each evaluation, mean over seeds")
    for name in (name for name in tables[0] if name != CONTROL):
        steps = zip(*(table[name]["history"] for table in tables), strict=True)
        values = (f"{mean(p for p, _ in s):.2f} / {mean(r for _, r in s):.2f}" for s in steps)
        print(f"{name:16s}", "   ".join(values))


def run_seed(configs: list[str], root: Path, seed: int, opts: list[str]) -> dict[str, dict]:
    """Return the results of each config on one seed's images and initial weights."""
    output = root / f"seed_{seed}"
    shapes = output / "shapes"
    make_shapes(shapes, ShapesSpec(seed=seed))
    host = import_host(read_host(configs[0], opts))

    def configure(config: str, run: str, *extra: object) -> CfgNode:
        keys = [*data_keys(shapes), "SEED", seed, "OUTPUT_DIR", output / run, *opts, *extra]
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
    rows = [(CONTROL, configs[0], NO_UNLABELED)]
    rows += [(Path(config).stem, config, ()) for config in configs]
    results = {}
    for name, config, extra in rows:
        cfg = configure(config, name, *start, *extra)
        finished = host.train(cfg, f"seed {seed}: {name}")
        lines = [line for line in host.read_log(cfg) if "pseudo/precision" in line]
        results[name] = {
            "results": finished.results,
            "history": [(line["pseudo/precision"], line["pseudo/recall"]) for line in lines],
        }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    return results


def summarize(tables: list[dict[str, dict]]) -> list[dict[str, str]]:
    """Mean and spread over seeds; the gain is over the control of the same seed."""
    rows = []
    for name in tables[0]:
        results = [table[name]["results"] for table in tables]
        controls = [table[CONTROL]["results"] for table in tables]
        gains = [r["teacher/AP"] - c["teacher/AP"] for r, c in zip(results, controls, strict=True)]
        row = dict.fromkeys(COLUMNS, "") | {"config": name}
        found = [metric for metric in METRICS if f"teacher/{metric}" in results[0]]
        row |= {metric: _spread([r[f"teacher/{metric}"] for r in results]) for metric in found}
        if name != CONTROL:
            row["gain in AP"] = _spread(gains, sign="+")
            row["gain of each seed"] = ", ".join(f"{gain:+.1f}" for gain in gains)
            for column, key in QUALITY.items():
                row[column] = f"{mean(r[key] for r in results):.2f}"
        rows.append(row)
    return rows


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
