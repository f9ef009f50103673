"""
What the student is given of unlabeled images: strong views, and pseudo-labels in their pixels.

Shape shorthand: N weak views, S strong ones, R boxes of one image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ssod.core.filters import kept_rows
from ssod.core.geometry import transfer_boxes
from ssod.core.method import Step
from ssod.core.structures import Layer, PseudoLabels

# Of strong views without a pseudo-box all is learned as "background"; or they are "left_out"; or
# all losses of unlabeled images are multiplied by the "share" of those with one.
EmptyImages = Literal["background", "left_out", "share"]


@torch.no_grad()
def transfer(step: Step) -> None:
    """
    Move the pseudo-boxes from the weak views that they were found in to the strong ones.

    Those of which too little is left there go, as `transfer_boxes` says.
    """
    views = step.unlabeled
    assert views is not None, "there are unlabeled images"
    if views.to_strong is None:
        return
    moved = [
        transfer_boxes(p.boxes, matrix, (strong.shape[1], strong.shape[2]), erased)
        for p, matrix, strong, erased in zip(
            step.pseudo_labels, views.to_strong, views.strong, views.erased, strict=True
        )
    ]
    rows = kept_rows([is_visible for _, is_visible in moved])
    step.pseudo_labels = [
        replace(p, boxes=boxes, found=p.boxes)[row]
        for p, (boxes, _), row in zip(step.pseudo_labels, moved, rows, strict=True)
    ]


def leave_out_empty(step: Step, empty_images: EmptyImages) -> float:
    """
    Decide about strong views in which the main branch has no target; changes the record.

    Of what is "left_out" one view stays if there is no other, so that losses have a graph. The
    numbers of boxes are known on the host, so nothing waits. They are those of a pass of a process.

    Returns:
        The factor on the losses of unlabeled images, in [0, 1].
    """
    views, count = step.unlabeled, len(step.learned)
    assert views is not None, "there are unlabeled images"
    kept = [row for row, labels in enumerate(step.learned) if len(labels)]
    step.empty_images = 1 - len(kept) / count
    if empty_images == "background" or len(kept) == count:
        return 1.0
    if empty_images == "share":
        return len(kept) / count
    rows = kept or [0]
    step.pseudo_labels = [step.pseudo_labels[row] for row in rows]
    step.learned = [step.learned[row] for row in rows]
    step.unlabeled = replace(
        views,
        strong=[views.strong[row] for row in rows],
        mixed=[_select(layer, rows) for layer in views.layers],
    )
    return float(bool(kept))


def _select(layer: Layer, rows: list[int]) -> Layer:
    matrices = layer.matrices
    return Layer(
        [layer.images[row] for row in rows],
        # Stacked, as an index of a list is copied to the device.
        None if matrices is None else torch.stack([matrices[row] for row in rows]),
    )


def describe(step: Step) -> dict[str, Tensor]:
    """Sums an image, which may be averaged over iterations and ranks, whatever their boxes."""
    kept = PseudoLabels.cat(step.pseudo_labels)
    sums = {
        "num": kept.reliable,
        "undecided": ~kept.reliable,
        "score": kept.scores * kept.reliable,
        "weight": kept.weights * kept.reliable,
    }
    found = {f"pseudo/{name}_per_image": step.per_image(value) for name, value in sums.items()}
    return found | {"pseudo/empty_images": kept.scores.new_full((), step.empty_images)}
