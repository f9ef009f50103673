"""The `train_net.py` command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ssod.cli.common import add_config_arguments, import_host, read_config, run_command
from ssod.config import read_host
from ssod.errors import InputError
from ssod.evaluation.coco_metrics import LOW_FLOOR_AP
from ssod.evaluation.report import format_table

COLUMNS = ("AP", LOW_FLOOR_AP, "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR100")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser, with Detectron2's option names."""
    parser = argparse.ArgumentParser(
        prog="train_net.py",
        description="Train a semi-supervised object detector, or evaluate one.",
        epilog="Example: train_net.py --config-file configs/quickstart.yaml "
        "OUTPUT_DIR output/mine SOLVER.MAX_ITER 2000",
    )
    add_config_arguments(parser, default="")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in OUTPUT_DIR, if there is one"
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the run in OUTPUT_DIR, or MODEL.WEIGHTS FILE, without training",
    )
    machines = parser.add_argument_group("several GPUs (Detectron2 host)")
    machines.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes on this machine, one a GPU"
    )
    machines.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines")
    machines.add_argument(
        "--machine-rank", type=int, default=0, metavar="N", help="number of this machine, from 0"
    )
    machines.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="tcp://HOST:PORT of machine 0; one machine finds a free port. torchrun's environment "
        "variables take the place of these four options",
    )
    return parser


def format_results(results: dict[str, float]) -> str:
    """Format evaluation metrics as a table, one row for each of teacher and student."""
    models = [m for m in ("teacher", "student") if f"{m}/AP" in results]
    rows = [{"model": m} | {c: results[f"{m}/{c}"] for c in COLUMNS} for m in models]
    return format_table(rows, ["model", *COLUMNS])


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run on the host that the config names."""
    args = build_parser().parse_args(argv)
    if read_host(args.config_file, args.opts) == "detectron2":
        import_host("detectron2", "launch").run(args)
        return
    if args.num_gpus != 1 or args.num_machines != 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "SSOD.HOST torchvision trains in one process; --num-gpus, --num-machines and torchrun "
            "are for SSOD.HOST detectron2"
        )
    _, cfg = read_config(args)
    cfg.freeze()
    results = import_host("torchvision", "run").run(cfg, args)
    if results:
        print(format_results(results))


def main() -> int:
    """Entry point; returns the exit status."""
    return run_command(run)
