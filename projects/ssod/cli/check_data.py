"""`ssod check-data`: look at all data of a config before training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from fvcore.common.config import CfgNode

from ssod.cli.common import add_config_arguments, read_config
from ssod.data import build
from ssod.data.check import (
    Findings,
    check_classes,
    check_files,
    check_overlap,
    describe_sets,
    scan_files,
)
from ssod.data.datasets import DetectionDataset
from ssod.errors import InputError
from ssod.evaluation.report import format_table
from ssod.progress import progress_bar

_SHOWN = 10  # problems of each kind
_LABELED = ("labeled", "validation", "hidden truth")
_CONFIG = "config and sets"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "check-data",
        help="look at all data of a config: counts, and every problem",
        description="Read all annotations and decode all images that a config names, in "
        "DATALOADER.NUM_WORKERS processes. Print what there is and every problem with its file "
        "and entry. The exit status is 1 if there are errors, 0 with warnings alone.",
        epilog="Example: ssod check-data --config-file mine.yaml SSOD.DATA.VAL_JSON other.json",
    )
    add_config_arguments(parser, required=True)
    parser.add_argument(
        "--all", action="store_true", help=f"show all problems, not {_SHOWN} of each kind"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Check, and print the tables and the problems; 1 if there are errors."""
    host, cfg = read_config(args)
    findings = Findings()
    sets = _read_sets(host, cfg, findings)
    file_names = [name for dataset in sets.values() for name in dataset.file_names]
    with progress_bar(total=len(file_names), unit="image", delay=0.5) as bar:
        facts = scan_files(file_names, cfg.DATALOADER.NUM_WORKERS, bar.update)
    for name, dataset in sets.items():
        check_files(name, dataset, facts, findings)
        if name in _LABELED:
            check_classes(name, dataset, findings)
    # The hidden truth is about the unlabeled images.
    distinct = {name: dataset for name, dataset in sets.items() if name != "hidden truth"}
    check_overlap(distinct, facts, findings)
    if not findings.errors:
        # What a run asks for on top, such as what the evaluators of its host need.
        _try(lambda: host.load_run_data(cfg), _CONFIG, findings)
    _print_tables(sets)
    limit = sys.maxsize if args.all else _SHOWN
    _print_problems("errors", findings.errors, limit)
    _print_problems("warnings", findings.warnings, limit)
    return 1 if findings.errors else 0


def _try(read: Callable[[], Any], kind: str, findings: Findings) -> Any:
    """Return what is read, None if that is impossible."""
    try:
        return read()
    except InputError as error:
        findings.errors[kind].append(str(error))
        return None


def _read_sets(host: ModuleType, cfg: CfgNode, findings: Findings) -> dict[str, DetectionDataset]:
    """Return the sets that can be read, by their names, in which broken entries are left out."""
    sets, names = host.read_sets(cfg, findings.collect)
    if sets.labeled is not None:
        for error in build.find_conflicts(cfg, sets, names):
            findings.errors[_CONFIG].append(str(error))
        if cfg.SSOD.DATA.PERCENT and sets.unlabeled is None:
            split = _try(lambda: build.split_labeled(cfg, sets.labeled), _CONFIG, findings)
            labeled, unlabeled = split or (sets.labeled, None)
            sets = replace(sets, labeled=labeled, unlabeled=unlabeled)
    found = (sets.labeled, sets.unlabeled, sets.val, sets.hidden_truth)
    names = ("labeled", "unlabeled", "validation", "hidden truth")
    return {name: dataset for name, dataset in zip(names, found, strict=True) if dataset}


def _print_tables(sets: dict[str, DetectionDataset]) -> None:
    rows, classes = describe_sets(sets, _LABELED)
    columns = ("set", "images", "boxes", "without boxes", "boxes an image", "width", "height")
    if rows:
        print(format_table([{c: row.get(c, "-") for c in columns} for row in rows], columns))
        print("(boxes an image, width and height: minimum / median / maximum; sizes in pixels)\n")
    if classes:
        print(format_table(classes, list(classes[0])), end="\n\n")


def _print_problems(title: str, problems: dict[str, list[str]], limit: int) -> None:
    print(f"{sum(map(len, problems.values()))} {title}")
    for kind, messages in problems.items():
        print(f"  {kind}: {len(messages)}")
        for message in messages[:limit]:
            print(f"    {' '.join(message.split())}")
        if len(messages) > limit:
            print(f"    and {len(messages) - limit} more; --all shows them")
