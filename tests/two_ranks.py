"""Runs in one process, or in one of several; imported by spawned processes."""

import contextlib
import io
import json

import torch
from detectron2.utils import comm
from PIL import Image

from contract.hosts import read_lines
from contract.methods import CASES
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY, PseudoLabelFilter
from ssod.core.structures import PseudoLabels
from ssod.hosts.detectron2.launch import leave_process_group
from ssod.hosts.detectron2.run import Run, find_checkpoint
from tiny_detectron2 import tiny_config

NUM_CLASSES, SIZE, IMAGES = 6, 64, 4
KEYS = (
    # Every anchor and region is learned, and each image has as many: means over ranks are means
    # over images then.
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 2048, "MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.2]"),
    *("INPUT.MIN_SIZE_TRAIN", [SIZE], "INPUT.RANDOM_FLIP", "none", "SOLVER.STEPS", []),
    *("SOLVER.IMS_PER_BATCH", IMAGES, "SSOD.DATA.UNLABELED_PER_BATCH", IMAGES),
    *("SSOD.BURN_IN_ITERS", 1, "SOLVER.MAX_ITER", 3, "SSOD.LOG_PERIOD", 1, "SOLVER.BASE_LR", 0.002),
    *("SSOD.LABELED_VIEWS", "both", "SSOD.DATA.VAL_JSON", "", "SSOD.DATA.UNLABELED_TRUTH_JSON", ""),
)
LSM = ("SSOD.LSM.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", 0.05)
NO_BOX = "a rank without a box"
GIVEN = dict.fromkeys(("given boxes", NO_BOX), ("SSOD.FILTER.NAME", "GivenBoxes", *LSM))
# What a teacher finds differs by rounding with the size of its batch, and with that now and then
# which anchors match it; given boxes have no such noise. Nor do they remember other passes.
ALL = GIVEN | {
    name: case.overrides
    + (
        ("SSOD.FILTER.NAME", "GivenBoxes")
        if case.methods and (case.filter == "FixedThreshold" or case.is_local)
        else ()
    )
    # Each process draws the size of its mosaic anew; images of one size are mixed without a draw.
    + (("SSOD.MIXPL.MOSAIC_WEIGHT", 0) if "MIXPL" in case.methods else ())
    for name, case in CASES.items()
}


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class GivenBoxes(PseudoLabelFilter):
    """
    Two boxes an image, or `only_first`: none in the second half of the images over all ranks.

    Their weights are below 1, so that the second branch distils their regions.
    """

    only_first = False

    def forward(self, detections):
        boxes = torch.tensor([[4.0, 6, 30, 40], [20, 20, 60, 50]])
        classes = torch.tensor([1, 4])
        weights = torch.full((2,), 0.625)
        probs = torch.full((2, NUM_CLASSES + 1), 0.1)
        labels = PseudoLabels(boxes, classes, weights, weights, weights, probs, weights > 0)
        place = comm.get_rank() * len(detections)
        end = len(detections) * comm.get_world_size() // (2 if self.only_first else 1)
        return [labels[: 2 if place + i < end else 0] for i in range(len(detections))]


def write_data(shapes, folder):
    """Write sets of images of one size: labeled ones, and copies of an unlabeled one."""
    folder.mkdir()
    keys = []
    for group in ("labeled", "unlabeled"):
        content = json.loads((shapes / "annotations" / f"{group}.json").read_text())
        images = content["images"][:IMAGES]
        source = images[0]["file_name"]
        for image in images:
            # What filters remember of an image does not depend on which one a rank had then.
            name = source if group == "unlabeled" else image["file_name"]
            picture = Image.open(shapes / "images" / name).resize((SIZE, SIZE))
            image["file_name"] = f"{group}_{image['id']}.png"
            image |= {"height": SIZE, "width": SIZE}
            picture.save(folder / image["file_name"])
        ids = {image["id"] for image in images}
        found = [a for a in content.get("annotations", ()) if a["image_id"] in ids]
        path = folder / f"{group}.json"
        path.write_text(json.dumps(content | {"images": images, "annotations": found}))
        keys += [f"SSOD.DATA.{group.upper()}_JSON", path]
        keys += [f"SSOD.DATA.{group.upper()}_IMAGES", folder]
    return keys


def train_all(shapes, keys, output, cases):
    """
    Train once for each case, in processes that are started once; rank 0 writes.

    Where the images of a pass are compared with each other, one process makes a pass of what each
    of two has in one.
    """
    torch.set_num_threads(1)
    for name, parts in cases:
        folder = output / f"{name}, {parts}, {comm.get_world_size()}"
        GivenBoxes.only_first = name == NO_BOX
        is_local = name in CASES and CASES[name].is_local
        passes = parts * (2 // comm.get_world_size() if is_local else 1)
        overrides = (*KEYS, *keys, *ALL[name], "SSOD.ACCUMULATE_STEPS", passes)
        with contextlib.redirect_stdout(io.StringIO()):
            Run(tiny_config(shapes, folder, *overrides)).train()
    leave_process_group()


def read(output, name, parts, world_size):
    """Return the losses and the model of a run."""
    folder = output / f"{name}, {parts}, {world_size}"
    losses = [
        {k: v for k, v in line.items() if "loss" in k or k.startswith("pseudo/")}
        for line in read_lines(folder)
    ]
    state = torch.load(find_checkpoint(str(folder)), weights_only=True)
    return losses, state["model"]
