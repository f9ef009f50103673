"""
What LabelMatch learns as objects, beside the hidden truth.

For finished runs of the torchvision host, the labels of whose unlabeled images are known: boxes an
image and precision of those that the filter trusts, those that are mined, and those that stay
undecided, and precision and recall of all that is learned as an object. Boxes are those of training
steps on the run's last weights, which stay as they are. Example:
python benchmarks/mining.py output/compare/seed_0/label_match output/compare/seed_0/act
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from ssod.cli.common import run_command
from ssod.config import merge_config
from ssod.core.method import Step
from ssod.core.structures import PseudoLabels, Targets, TwoStreamBatch
from ssod.data.build import build_train_loader
from ssod.evaluation.pseudo_labels import pseudo_label_quality
from ssod.evaluation.report import format_table
from ssod.hosts.protocol import CONFIG_NAME
from ssod.hosts.torchvision.defaults import get_config
from ssod.hosts.torchvision.run import Run, find_checkpoint

COLUMNS = ("run", *(f"{kind}, {what}" for kind in ("trusted", "mined") for what in ("n", "prec.")))
COLUMNS += ("undecided, n", "undecided, prec.", "objects, prec.", "objects, recall")
Kept = tuple[list[PseudoLabels], list[PseudoLabels]]  # by the filter, and after the mining


def measure(folder: Path, iterations: int) -> dict[str, str]:
    """Return the row of a run."""
    cfg = merge_config(get_config(), str(folder / CONFIG_NAME))
    data = cfg.SSOD.DATA
    # The unlabeled images with their truth as labels, so that boxes go through the views too.
    data.LABELED_JSON, data.LABELED_IMAGES = data.UNLABELED_TRUTH_JSON, data.UNLABELED_IMAGES
    data.UNLABELED_JSON, data.UNLABELED_IMAGES = data.VAL_JSON, data.VAL_IMAGES  # not looked at
    cfg.SSOD.LABELED_VIEWS, cfg.MODEL.WEIGHTS, cfg.SSOD.BURN_IN_ITERS = "both", "", 0
    cfg.SOLVER.MAX_ITER = iterations
    run = Run(cfg)
    state = torch.load(find_checkpoint(folder), weights_only=True)
    run.model.load_state_dict(state["model"])
    found, truth = [], []
    for batch in build_train_loader(cfg, run.data, 0):
        images = replace(batch.labeled, targets=None)
        found.append(_step(run, TwoStreamBatch(batch.labeled, images, [])))
        truth += batch.labeled.targets
    before, after = ([p for kept in found for p in kept[i]] for i in (0, 1))
    mined = [a.reliable & ~b.reliable for a, b in zip(after, before, strict=True)]
    objects = [a.reliable for a in after]
    groups = {
        "trusted": [b.reliable for b in before],
        "mined": mined,
        "undecided": [~o for o in objects],
        "objects": objects,
    }
    row = {"run": str(folder)}
    for name, masks in groups.items():
        quality = _quality(after, masks, truth, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        row[f"{name}, n"] = f"{quality.num_per_image:.2f}"
        row[f"{name}, prec."] = f"{quality.precision:.2f}" if quality.num_per_image else ""
        row[f"{name}, recall"] = f"{quality.recall:.2f}"
    return {column: row[column] for column in COLUMNS}


def _step(run: Run, batch: TwoStreamBatch) -> Kept:
    """The pseudo-labels of a training step's losses."""
    kept: list[list[PseudoLabels]] = []
    model = run.model
    compute = model.unsupervised_losses

    def recording(step: Step) -> dict[str, Tensor]:
        kept.append(step.pseudo_labels)
        losses = compute(step)
        kept.append(step.pseudo_labels)
        return losses

    run.step.prepare()
    with patch.object(model, "unsupervised_losses", recording), torch.no_grad():
        model(batch)
    model.iteration += 1
    return kept[0], kept[1]


def _quality(
    labels: list[PseudoLabels], masks: list[Tensor], truth: list[Targets], num_classes: int
):
    kept = [p[mask] for p, mask in zip(labels, masks, strict=True)]
    return pseudo_label_quality(
        *([getattr(k, name) for k in kept] for name in ("boxes", "scores", "classes")),
        [t.boxes for t in truth],
        [t.classes for t in truth],
        num_classes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--iterations", type=int, default=50, metavar="N")
    args = parser.parse_args()
    rows = [measure(folder, args.iterations) for folder in args.runs]
    print(format_table(rows, COLUMNS))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
