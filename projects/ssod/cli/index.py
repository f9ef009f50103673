"""`ssod index`: list the images of a folder in a file that a run opens in seconds."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from ssod.data.datasets import find_images, read_sizes
from ssod.data.index import can_be_listed, write_index
from ssod.data.splits import make_split
from ssod.errors import InputError
from ssod.files import replacing
from ssod.progress import progress_bar

logger = logging.getLogger(__name__)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "index",
        help="list the images of a folder in a file that a run opens in seconds",
        description="Find the images below a folder, read the size of each from its header, and "
        "write a list for SSOD.DATA.UNLABELED_INDEX. Images that cannot be read are left out.",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder of images; subfolders are searched"
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="index to write")
    parser.add_argument(
        "--percent",
        type=float,
        default=100.0,
        metavar="P",
        help="list a random share of the images, chosen by their paths in FOLDER, so the same "
        "on every machine (default: 100)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another one chooses others (default: 0)"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Write the index, and print what is in it."""
    if not 0 < args.percent <= 100:
        raise InputError(f"--percent must be in (0, 100], got {args.percent}")
    root, output = os.path.abspath(args.folder), Path(args.output)
    # Not found out only after all images have been read.
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(
            f"{output}: cannot be written; name a file in a folder that is there and writable"
        )
    names, num_found = _choose(root, args.percent, args.seed)
    images = _read(root, names)
    try:
        with replacing(output) as partial:
            write_index(partial, root, images)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from error
    print(f"{output}: {len(images)} of the {num_found} images of {root}")


def _choose(root: str, percent: float, seed: int) -> tuple[list[str], int]:
    """Return the images to list, and how many there are."""
    if not can_be_listed(root):
        raise InputError(f"{root!r}: rename this folder; an index cannot name tabs and newlines")
    found = find_images(root)
    names = [name for name in found if can_be_listed(name)]
    for name in set(found).difference(names):
        logger.warning("Left out %r: a path in an index has no tab and no newline", name)
    if not names:
        raise InputError(f"{root}: expected a folder with images, but it has none")
    return names if percent == 100 else sorted(make_split(names, percent, seed)), len(found)


def _read(root: str, names: list[str]) -> list[tuple[str, int, int]]:
    """Return path, height and width of each image that can be read; report the others."""
    images, failures = [], []
    bar = progress_bar(names, desc=root, unit="image", delay=0.5)
    for name, size in zip(bar, read_sizes(root, names), strict=True):
        if isinstance(size, InputError):
            failures.append(size)
        else:
            images.append((name, *size))
    for failure in failures:
        logger.warning("Left out %s", failure)
    if not images:
        raise InputError(f"{root}: none of its {len(names)} images is readable")
    return images
