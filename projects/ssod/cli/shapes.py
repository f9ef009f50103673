"""`ssod shapes`: write the synthetic data set."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from ssod.data.shapes import ShapesSpec, ensure_shapes
from ssod.progress import progress_bar

_HELP = {
    "num_labeled": "labeled images",
    "num_unlabeled": "unlabeled images",
    "num_val": "validation images",
    "image_size": "long side in pixels",
    "seed": "sets of different seeds share no image",
    "max_objects": "most objects an image",
    "max_foreign": "most objects of other classes an unlabeled image: no label or truth has them",
    "crowded": "a harder set: 12 classes that share hues, up to 13 smaller objects an image",
}


def add_spec_arguments(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """Add an option for each field of `ShapesSpec` but those left out."""
    for field in fields(ShapesSpec):
        option, text = "--" + field.name.replace("_", "-"), _HELP[field.name]
        if field.name in leave_out:
            continue
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=text)
        else:
            default = getattr(ShapesSpec(), field.name)
            parser.add_argument(
                option,
                type=int,
                default=field.default,
                metavar="N",
                help=f"{text} (default: {default})",
            )


def read_spec(args: argparse.Namespace) -> ShapesSpec:
    """Return the set that the options ask for, with defaults for those left out."""
    names = [field.name for field in fields(ShapesSpec) if field.name in args]
    return ShapesSpec(**{name: getattr(args, name) for name in names})


def make_shapes(root: str | Path, spec: ShapesSpec) -> bool:
    """Make the set with a progress bar; False if an equal one was there."""
    with progress_bar(desc=f"Shapes in {root}", unit="image", delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return ensure_shapes(root, spec, progress)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser("shapes", help="write the synthetic Shapes set in COCO format")
    parser.add_argument("root", help="folder to write; an equal set that is there is kept")
    add_spec_arguments(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Write the set unless an equal one is there."""
    made = make_shapes(args.root, read_spec(args))
    print(f"{args.root}: {'written' if made else 'already there'}")
