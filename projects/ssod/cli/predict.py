"""`ssod predict`: the boxes that a trained detector finds in images."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from PIL import Image

from ssod.cli.common import find_weights, import_host
from ssod.config import merge_config, read_host
from ssod.core.interfaces import RegionDetector
from ssod.core.structures import Detections
from ssod.data.datasets import DetectionDataset, ImageRecord, read_images
from ssod.data.images import read_image
from ssod.errors import InputError
from ssod.evaluation.coco_metrics import detections_to_coco
from ssod.evaluation.drawing import draw_boxes
from ssod.files import replacing
from ssod.hosts.checkpoint import load_run
from ssod.hosts.inference import find
from ssod.hosts.protocol import CONFIG_NAME
from ssod.progress import progress_bar

logger = logging.getLogger(__name__)

PREDICTIONS_NAME, IMAGES_NAME = "predictions.json", "images"
_LEAST_SIDE = 400  # longer sides of drawn images; labels would cover smaller ones
_DESCRIPTION = """\
Detect objects in images with the teacher of a run (its student, if the teacher has not started).
DIR/predictions.json is a COCO file: images, categories, and annotations with a score, boxes as
[x, y, width, height] in pixels of the upright image. Its annotations alone are COCO results. The
images are drawn with their boxes into DIR/images; small ones are enlarged."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "predict",
        help="detect objects in images; write COCO JSON and drawn images",
        description=_DESCRIPTION,
        epilog="Example: ssod predict photos/ more/x.jpg --weights output/quickstart/supervised",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="image files, and folders with all below them"
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="W",
        help="checkpoint of a run, or the folder of a run for its last one",
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help=f"config of the run (default: {CONFIG_NAME} in the folder of the checkpoint)",
    )
    parser.add_argument(
        "--output",
        default="output/predictions",
        metavar="DIR",
        help="folder to write, which must be new or empty (default: %(default)s)",
    )
    parser.add_argument(
        "--score-thresh",
        type=float,
        default=0.5,
        metavar="P",
        help="leave out boxes with a lower score (default: %(default)s); those below the run's "
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST are never found",
    )
    parser.add_argument("--student", action="store_true", help="the student, not the teacher")
    parser.add_argument("--no-images", action="store_true", help="do not draw")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Detect, write and draw; images that cannot be decoded are an error once the rest is done."""
    if not 0 <= args.score_thresh <= 1:
        raise InputError(f"--score-thresh must be in [0, 1], got {args.score_thresh}")
    output = Path(args.output)
    # An older result may be a picture's only copy, and images there may be those to read.
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output}: already there; remove it or choose another --output")
    host, cfg = _read_config(args.weights, args.config_file)
    checkpoint = find_weights(host, args.weights)
    model = host.build(cfg)
    state = load_run(model, checkpoint)
    use_teacher = model.teacher_started and not args.student
    which = f"{'teacher' if use_teacher else 'student'} of {checkpoint}"
    categories = _categories(state, cfg.MODEL.ROI_HEADS.NUM_CLASSES, checkpoint)
    names, ids = [c["name"] for c in categories], [c["id"] for c in categories]
    dataset, unreadable = read_images(args.images, names, ids)
    for error in unreadable:
        logger.warning("left out %s", error)
    try:
        output.mkdir(parents=True, exist_ok=True)
        result = _predict(model.teacher if use_teacher else model.student, dataset, cfg, args)
        result["info"] = {
            "description": f"{which}, iteration {model.iteration}, scores >= {args.score_thresh}"
        }
        result["categories"] = categories
        with replacing(output / PREDICTIONS_NAME) as partial:
            partial.write_text(json.dumps(result))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error}); choose another one") from error
    num_done = len(result["images"])
    print(f"{which} found {len(result['annotations'])} boxes in {num_done} images")
    print(f"written: {output / PREDICTIONS_NAME}")
    if not args.no_images:
        print(f"drawn: {output / IMAGES_NAME}")
    if num_failed := len(unreadable) + len(dataset) - num_done:
        raise InputError(
            f"{num_failed} images cannot be decoded and are not in {output}; see above which"
        )


def _read_config(weights: str, config_file: str | None) -> tuple[Any, CfgNode]:
    """Return the host and the config of a run, changed to what this machine can do."""
    path = Path(weights)
    if not path.exists():
        raise InputError(f"{path}: not found; --weights takes a checkpoint or the folder of a run")
    config = config_file or str((path if path.is_dir() else path.parent) / CONFIG_NAME)
    if not Path(config).is_file():
        raise InputError(f"{config}: not found; name the config of the run with --config-file")
    host = import_host(read_host(config))
    # What the run started from may be gone, and is not needed; nor is code of the run's.
    overrides, is_named = ["MODEL.WEIGHTS", ""], config_file is not None
    cfg = merge_config(host.get_config(), config, overrides, run_plugin=is_named)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return host, cfg


def _categories(state: dict, num_classes: int, checkpoint: Path) -> list[dict[str, Any]]:
    if "categories" in state:
        return state["categories"]
    logger.warning("%s has no class names; they are written as class 0, 1, ...", checkpoint)
    return [{"id": label, "name": f"class {label}"} for label in range(num_classes)]


def _predict(
    detector: RegionDetector, dataset: DetectionDataset, cfg: CfgNode, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the images and annotations of the COCO file, drawing on the way."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    device = next(detector.parameters()).device
    progress = progress_bar(
        find(detector, dataset, cfg, device, skip_broken=True),
        total=len(dataset),
        desc="predicting",
        unit="image",
    )
    for record, found in progress:
        found = found[found.scores >= args.score_thresh]
        number = len(images) + 1
        images.append(
            {"id": number, "file_name": record.image_id}
            | {"height": record.height, "width": record.width}
        )
        for result in detections_to_coco(
            number, found.boxes, found.scores, found.classes, dataset.category_ids
        ):
            area = result["bbox"][2] * result["bbox"][3]
            annotations.append({"id": len(annotations) + 1} | result | {"area": area, "iscrowd": 0})
        if not args.no_images:
            _draw(record, found, dataset.class_names, Path(args.output) / IMAGES_NAME)
    done = {image["file_name"] for image in images}
    for image_id in dataset.image_ids:
        if image_id not in done:
            logger.warning("left out %s: it cannot be decoded", image_id)
    return {"images": images, "annotations": annotations}


def _draw(record: ImageRecord, found: Detections, names: Sequence[str], folder: Path) -> None:
    """Draw on the image as it is on disk, to a file of the same name and format."""
    labels, scores = found.classes.tolist(), found.scores.tolist()
    picture = draw_boxes(
        read_image(record.file_name),
        found.boxes.numpy(),
        found.classes.numpy(),
        [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)],
        scale=max(1, math.ceil(_LEAST_SIDE / max(record.height, record.width))),
    )
    path = folder / record.image_id
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        picture.save(partial, Image.registered_extensions()[path.suffix.lower()], quality=95)
