"""`ssod shapes`: write the synthetic data set."""

from __future__ import annotations

import argparse
from dataclasses import fields

from tqdm import tqdm

from ssod.data.shapes import ShapesSpec, ensure_shapes


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "shapes",
        help="write the synthetic Shapes set in COCO format",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("root", help="folder to write; an equal set that is there is kept")
    for field in fields(ShapesSpec):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default, help="whole number")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Write the set unless an equal one is there."""
    spec = ShapesSpec(**{field.name: getattr(args, field.name) for field in fields(ShapesSpec)})
    with tqdm(desc=args.root, unit="image", dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = ensure_shapes(args.root, spec, progress)
    print(f"{args.root}: {'written' if made else 'already there'}")
