"""What the commands share."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fvcore.common.config import CfgNode

from ssod.config import merge_config, read_host
from ssod.errors import InputError


def run_command(command: Callable[[], int | None]) -> int:
    """
    Run a command as a program: messages on stderr, bad input as one line.

    Returns:
        Exit status: what the command returns or 0, 2 for an `InputError`, 130 if interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return command() or 0
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def add_config_arguments(parser: argparse.ArgumentParser, **config_file: Any) -> None:
    """Add `--config-file`, with these arguments of `add_argument`, and the overrides."""
    config_file = {"metavar": "FILE", "help": "YAML config"} | config_file
    parser.add_argument("--config-file", **config_file)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override"
    )


def import_host(name: str, module: str = "host") -> ModuleType:
    """
    Import a module of a host; for what the commands need in `host` see `ssod.hosts.protocol`.

    Raises:
        InputError: if what the host is built on is not installed.
    """
    try:
        return importlib.import_module(f"ssod.hosts.{name}.{module}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"SSOD.HOST {name} needs the module {error.name}: install the extra with "
            f"`uv sync --extra {name}`"
        ) from error


def read_config(args: argparse.Namespace) -> tuple[ModuleType, CfgNode]:
    """Return the host of `--config-file` and overrides, and the config; errors as theirs."""
    host = import_host(read_host(args.config_file, args.opts))
    return host, merge_config(host.get_config(), args.config_file, args.opts)


def find_weights(host: ModuleType, weights: str) -> Path:
    """
    Return the checkpoint that an option means: a file, or the last one in the folder of a run.

    Raises:
        InputError: if there is none.
    """
    path = Path(weights)
    found = host.last_checkpoint(path) if path.is_dir() else path
    if not found.is_file():
        raise InputError(
            f"{found}: checkpoint not found; --weights takes a checkpoint or the folder of a run"
        )
    return found
