"""The `ssod` program."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import ssod
from ssod.cli import (
    check_data,
    export,
    index,
    predict,
    quickstart,
    shapes,
    split,
    visualize_data,
)
from ssod.cli.common import run_command

COMMANDS = (quickstart, shapes, split, index, check_data, visualize_data, predict, export)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with one subcommand a module."""
    parser = argparse.ArgumentParser(
        prog="ssod", description="Semi-supervised object detection. Training: train_net.py."
    )
    parser.add_argument("--version", action="version", version=f"ssod {ssod.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: args.command(args))


if __name__ == "__main__":
    sys.exit(main())
