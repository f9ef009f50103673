"""`ssod visualize-data`: what a training sees, and what its teacher says of it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image

from ssod.cli.common import add_config_arguments, find_weights, read_config
from ssod.core.structures import PseudoLabels
from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import RunData, build_train_loader
from ssod.data.datasets import DetectionDataset, ImageRecord
from ssod.data.loader import first_samples
from ssod.data.samples import TrainingSample
from ssod.errors import InputError
from ssod.evaluation.drawing import draw_boxes, draw_sheet
from ssod.evaluation.report import format_table
from ssod.files import replacing
from ssod.hosts.checkpoint import load_run
from ssod.hosts.inference import IMAGES_PER_BATCH
from ssod.hosts.sweep import tell_labels

logger = logging.getLogger(__name__)

_SIDE = 480  # longer side of a drawn view, in pixels
_COLUMNS = 4  # two pairs of views
_LEGEND = "solid: learned pseudo-box, with its score, and its weight w if not 1; dashed: undecided"
_Cell = tuple[Image.Image, str]
_Drawn = tuple[list[_Cell], list[dict[str, Any]]]  # a sheet, and a row of the table for each image


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "visualize-data",
        help="draw weak and strong views of a config, and the teacher's pseudo-boxes",
        description="Draw the first images that a training with this config sees after the "
        "burn-in, in their weak and strong views: DIR/labeled.png with their boxes, "
        "DIR/unlabeled.png with the pseudo-boxes of a checkpoint and, where the config names "
        "hidden truth, the true boxes in thin green. Pictures of an earlier call are replaced.",
    )
    add_config_arguments(parser, required=True)
    parser.add_argument(
        "--weights",
        metavar="W",
        help="checkpoint or folder of a run: draw what its teacher and filter make of the images",
    )
    parser.add_argument(
        "--num-images", type=int, default=8, metavar="N", help="of each kind (default: 8)"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write into (default: OUTPUT_DIR/views)"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Draw, and print what was drawn."""
    if args.num_images < 1:
        raise InputError(f"--num-images must be at least 1, got {args.num_images}")
    host, cfg = read_config(args)
    data = host.load_run_data(cfg)
    if data.unlabeled is not None and data.hidden_truth is not None:
        data = replace(data, unlabeled=_with_boxes(data.unlabeled, data.hidden_truth))
    burn_in_iters = cfg.SSOD.BURN_IN_ITERS
    start_iter = burn_in_iters if burn_in_iters < cfg.SOLVER.MAX_ITER else 0
    samples = first_samples(build_train_loader(cfg, data, start_iter), args.num_images)
    for file_name in (name for stream in samples for s in stream for name in s.failed):
        logger.warning("%s cannot be decoded; another image replaces it", file_name)
    labeled, unlabeled = samples
    found: list[PseudoLabels] | None = None
    if args.weights and unlabeled:
        found = _pseudo_labels(_load(host, cfg, data, args.weights), unlabeled)
    elif args.weights:
        logger.warning("--weights is not used: this config trains on labeled images alone")
    output = Path(args.output or Path(cfg.OUTPUT_DIR, "views"))
    names, what = data.labeled.class_names, f"{args.config_file}, from iteration {start_iter} on"
    _write(output / "labeled.png", f"labeled images of {what}", _draw_labeled(labeled, names, cfg))
    if not unlabeled:
        print("no unlabeled images: this config trains on labeled images alone")
        return
    has_truth = data.hidden_truth is not None
    legend = f"unlabeled images of {what}" + (f"\n{_LEGEND}" if found else "")
    legend += "; thin green: hidden truth" if has_truth else ""
    _write(output / "unlabeled.png", legend, _draw_unlabeled(unlabeled, found, names, has_truth))


def _with_boxes(dataset: DetectionDataset, truth: DetectionDataset) -> DetectionDataset:
    """Give the images of a set the boxes that they have in another, by their files."""
    rows = {file_name: index for index, file_name in enumerate(truth.file_names)}

    def with_boxes(record: ImageRecord) -> ImageRecord:
        if record.file_name not in rows:
            return record
        other = truth[rows[record.file_name]]
        return replace(record, boxes=other.boxes, classes=other.classes)

    return DetectionDataset(map(with_boxes, dataset), dataset.class_names, dataset.category_ids)


def _load(host: ModuleType, cfg: CfgNode, data: RunData, weights: str) -> TeacherStudent:
    checkpoint = find_weights(host, weights)
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = ""  # all of them are the run's
    model = host.build(cfg)
    load_run(model, checkpoint)
    if not model.teacher_started:
        raise InputError(
            f"{checkpoint}: its teacher had not started at iteration {model.iteration}, so there "
            "are no pseudo-boxes; name a checkpoint from after the burn-in, or leave --weights out"
        )
    tell_labels(model, data)
    return model.eval()


def _pseudo_labels(
    model: TeacherStudent, samples: list[TrainingSample]
) -> list[PseudoLabels] | None:
    """Label weak views in eval mode, which leaves the filter alone; None if it is not ready."""
    if not model.pseudo_label_filter.is_ready:
        logger.warning(
            "%s has no thresholds yet at iteration %d, so no pseudo-boxes are drawn",
            type(model.pseudo_label_filter).__name__,
            model.iteration,
        )
        return None
    device = next(model.parameters()).device
    found: list[PseudoLabels] = []
    for start in range(0, len(samples), IMAGES_PER_BATCH):
        views = [sample.weak.to(device) for sample in samples[start : start + IMAGES_PER_BATCH]]
        found += [labels.to("cpu") for labels in model.pseudo_labels(views)]
    return found


def _draw_views(sample: TrainingSample, notes: Sequence[str], **boxes: Any) -> Iterator[_Cell]:
    """Draw boxes of the weak view on it and, if there is one, what is left in the strong view."""
    views = {"weak": (sample.weak, boxes), "strong": (sample.strong, _in_strong(sample, boxes))}
    for (name, (view, drawn)), note in zip(views.items(), notes, strict=True):
        if view is not None:
            image = view.permute(1, 2, 0).numpy()
            picture = draw_boxes(image, scale=_SIDE / max(image.shape), **drawn)
            yield picture, f"{sample.image_id}: {name} view{note}"


def _in_strong(sample: TrainingSample, boxes: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `draw_boxes` for the strong view, given those for the weak one."""
    moved, is_left = sample.in_strong(torch.as_tensor(boxes["boxes"], dtype=torch.float32))
    rows = is_left.nonzero().flatten().tolist()
    drawn = {name: [boxes[name][row] for row in rows] for name in boxes if name != "true_boxes"}
    drawn["boxes"] = moved[is_left].numpy()
    if "true_boxes" in boxes:
        moved, is_left = sample.in_strong(torch.as_tensor(boxes["true_boxes"]))
        drawn["true_boxes"] = moved[is_left].numpy()
    return drawn


def _draw_labeled(samples: list[TrainingSample], names: Sequence[str], cfg: CfgNode) -> _Drawn:
    learned = cfg.SSOD.LABELED_VIEWS
    notes = ["" if learned in ("both", view) else ", not learned" for view in ("weak", "strong")]
    cells, rows = [], []
    for sample in samples:
        texts = [names[label] for label in sample.classes.tolist()]
        boxes = {"boxes": sample.boxes.numpy(), "classes": sample.classes.numpy(), "texts": texts}
        cells += _draw_views(sample, notes, **boxes)
        rows.append({"image": sample.image_id, "boxes": len(sample.boxes)})
    return cells, rows


def _draw_unlabeled(
    samples: list[TrainingSample],
    found: list[PseudoLabels] | None,
    names: Sequence[str],
    has_truth: bool,
) -> _Drawn:
    cells, rows = [], []
    for index, sample in enumerate(samples):
        boxes: dict[str, Any] = {"boxes": np.empty((0, 4)), "classes": (), "texts": ()}
        row: dict[str, Any] = {"image": sample.image_id}
        if found is not None:
            labels = found[index]
            columns = (labels.classes, labels.scores, labels.weights)
            parts = zip(*(column.tolist() for column in columns), strict=True)
            boxes = {
                "boxes": labels.boxes.numpy(),
                "classes": labels.classes.numpy(),
                "texts": [_text(names[c], score, weight) for c, score, weight in parts],
                "dashed": ~labels.reliable.numpy(),
            }
            row["learned"] = int(labels.reliable.sum())
            row["undecided"] = len(labels) - row["learned"]
        if has_truth:
            boxes["true_boxes"] = sample.boxes.numpy()
            row["true boxes"] = len(sample.boxes)
        cells += _draw_views(sample, (", for the teacher", ", for the student"), **boxes)
        rows.append(row)
    return cells, rows


def _text(name: str, score: float, weight: float) -> str:
    return f"{name} {score:.2f}" + (f" w {weight:.2f}" if 0 < weight < 1 else "")


def _write(path: Path, heading: str, drawn: _Drawn) -> None:
    """Write a picture, and print the table of its images."""
    cells, rows = drawn
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            draw_sheet(heading, cells, _COLUMNS).save(partial, "PNG")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another --output") from error
    print(f"{path}\n{format_table(rows, list(rows[0]))}\n")
