"""`ssod export`: a trained detector for Detectron2 alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from ssod.config import merge_config, read_host
from ssod.errors import InputError

_USAGE = """\
To detect objects in an image, a uint8 array (H, W, 3) in BGR order, with Detectron2 alone:
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor
    cfg = get_cfg()
    cfg.merge_from_file({config!r})
    instances = DefaultPredictor(cfg)(image)["instances"]
The config names the weights by their absolute path, and the device of the run: set
cfg.MODEL.WEIGHTS if the folder moves, and cfg.MODEL.DEVICE for another device."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "export",
        help="write a run's detector as a model of Detectron2 alone",
        description="Write the teacher of a run on the Detectron2 host as weights and config "
        "that Detectron2 loads without this project.",
    )
    parser.add_argument("run", metavar="RUN", help="OUTPUT_DIR of the run")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="checkpoint, a path or a name in RUN such as model_best.pth "
        "(default: the last one saved)",
    )
    parser.add_argument("--student", action="store_true", help="the student, not the teacher")
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write into (default: RUN/exported)"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Export, and print how to use what was written."""
    folder = Path(args.run)
    config = folder / "config.yaml"
    if not config.is_file():
        raise InputError(f"{config}: not found; RUN is the OUTPUT_DIR of a run")
    name = read_host(str(config))
    if name != "detectron2":
        raise InputError(f"{config}: a run of the {name} host; only those of detectron2 export")
    # Not at the top: the other commands work without Detectron2.
    try:
        from ssod.hosts.detectron2 import host
        from ssod.hosts.detectron2.export import export_detector
    except ModuleNotFoundError as error:
        raise InputError(
            f"export needs Detectron2 ({error}); install it with: uv sync --extra detectron2"
        ) from error
    checkpoint = _find_checkpoint(folder, args.checkpoint, host.last_checkpoint(folder))
    output = Path(args.output) if args.output else folder / "exported"
    which = "student" if args.student else "teacher"
    # The detector needs no code of the run's.
    cfg = merge_config(host.get_config(), str(config), run_plugin=False)
    export_detector(cfg, checkpoint, output, which)
    print(f"{which} of {checkpoint} written to {output}")
    print(_USAGE.format(config=str((output / "config.yaml").resolve())))


def _find_checkpoint(folder: Path, name: str | None, last: Path) -> Path:
    """Return the checkpoint of a name in the folder or a path; without one the last."""
    candidates = [folder / name, Path(name)] if name else [last]
    for path in candidates:
        if path.is_file():
            return path
    looked = " or ".join(dict.fromkeys(map(str, candidates)))
    raise InputError(f"no checkpoint {looked}; name one with --checkpoint")
