"""Iterations with views of any geometry, and what the teacher says of one region at a time."""

from dataclasses import replace

import numpy as np
import torch
from fake_detector import FakeDetector
from fake_training import make_images

from contract.torchvision_case import build
from ssod.core.filters import FixedThreshold
from ssod.core.geometry import view_matrix
from ssod.core.method import Method
from ssod.core.structures import Layer, PseudoLabels, Targets, TwoStreamBatch, Views
from ssod.core.teacher_student import TeacherStudent

DETECTORS = ("fake", "torchvision")
GEOMETRIES = ("same", "moved", "mixed")


class Spy(Method):
    """Notes the record of the step and the samples as the host has drawn them."""

    group = "SPY"

    def reweight(self, step, samples, regions):
        self.step, self.sampled = step, samples
        return samples


class Mixing(Method):
    """Shows the first two weak views in the strong ones, over the last two."""

    group = "MIXING"

    def mix(self, views, pseudo_labels):
        (first,) = views.layers
        shift = view_matrix(0.75, 0.75)
        over = torch.stack([shift.to(first.matrices) @ first.matrices[i] for i in (1, 2)])
        layers = [Layer([0, 1], first.matrices[:2]), Layer([1, 2], over)]
        added = [
            replace(
                labels,
                boxes=labels.boxes * 0.75,
                layer=torch.ones_like(labels.layer),
            )
            for labels in pseudo_labels[1:]
        ]
        pairs = zip(pseudo_labels[:2], added, strict=True)
        labels = [PseudoLabels.cat(pair) for pair in pairs]
        return replace(views, strong=views.strong[:2], mixed=layers), labels


def make_batch(size, geometry):
    """One labeled image and three unlabeled ones, square, of which the second is flipped."""
    generator = torch.Generator().manual_seed(3)

    def images(count):
        if size == 4:
            return make_images(generator, count)
        small = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return list(small.repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3))

    box = torch.tensor([[0.25, 0.25, 0.75, 0.9]]) * size
    targets = [Targets.from_ground_truth(box, torch.tensor([1]), 2 if size == 4 else 3)]
    labeled = Views(images(1), images(1), targets, [0])
    unlabeled = Views(images(3), images(3), None, [1, 2, 3])
    if geometry != "same":
        shift = torch.eye(3, dtype=torch.float64)
        shift[:2, 2] = torch.tensor([0.1, -0.15]) * size
        matrices = [shift, view_matrix(1, 1, size), view_matrix(0.8, 0.9)]
        unlabeled.to_strong = torch.stack(matrices)
        unlabeled.erased = [torch.zeros(0, 4)] * 3
    return TwoStreamBatch(labeled, unlabeled, [])


def make_model(detector, geometry, *methods, thresholds=None, **options):
    """A started model, with a `Spy`; reliable and undecided boxes by default."""
    torch.manual_seed(0)
    student = FakeDetector() if detector == "fake" else build()
    thresholds = thresholds or {"fake": (0.95, 0.3), "torchvision": (0.345, 0.2)}[detector]
    if detector == "fake":
        with torch.no_grad():  # so that images differ, and regions stay near to where they were
            student.body.weight *= 6
            student.box_deltas.weight *= 0.25
            student.box_deltas.bias *= 0.25
    mixing = [Mixing()] if geometry == "mixed" else []
    named = {f"M{i}": method for i, method in enumerate([*mixing, Spy(), *methods])}
    options = {"unsup_box_losses": True, "burn_in_iters": 0, "ema_decay": 0.5} | options
    model = TeacherStudent(
        student, FixedThreshold(*thresholds), unsup_loss_weight=1.0, methods=named, **options
    )
    model.start_teacher_if_due()
    return model.train()


def iterate(model, detector, geometry, seed=7):
    """The losses of an iteration, its record, and the samples as they were drawn."""
    torch.manual_seed(seed)
    losses = model(make_batch(4 if detector == "fake" else 64, geometry))
    spy = next(m for m in model.methods.values() if isinstance(m, Spy))
    return losses, spy.step, spy.sampled


def in_weak_view(step, layer, view, box):
    """Where a box of a strong view is in the weak one, by its corners and in float64."""
    box = box.double().numpy()
    if layer.matrices is None:
        return box
    back = np.linalg.inv(layer.matrices[view].double().numpy())
    corners = [back @ [x, y, 1] for x in box[[0, 2]] for y in box[[1, 3]]]
    x, y = np.array(corners)[:, 0], np.array(corners)[:, 1]
    return clip(step, layer, view, np.array([x.min(), y.min(), x.max(), y.max()]))


def clip(step, layer, view, box):
    """A box inside the weak view."""
    height, width = step.unlabeled.weak[layer.images[view]].shape[1:]
    return np.clip(box, 0, [width, height, width, height])


@torch.no_grad()
def ask(step, layer, view, box):
    """The teacher's (K + 1,) probabilities of a box of a weak view, and (K or 1, 4) boxes."""
    image = layer.images[view]
    features = {name: level[image : image + 1] for name, level in step.teacher_features.items()}
    boxes = torch.tensor(box, dtype=torch.float32)[None]
    output = step.teacher.score_regions(features, [boxes])
    probs = step.rescore(output.logits.softmax(1), output.embeddings)[0]
    refined = step.teacher.decode(boxes, output.deltas)[0]
    return probs.double().numpy(), refined.double().numpy()


def regressed(step, layer, view, box, label):
    """The teacher's box of a class for a box of a weak view, clipped to it."""
    _, refined = ask(step, layer, view, box)
    return clip(step, layer, view, refined[min(label, len(refined) - 1)])


def iou(a, b):
    """IoU of two boxes, float64; 0 if they are both empty."""
    (x0, y0), (x1, y1) = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = max(x1 - x0, 0) * max(y1 - y0, 0)
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - shared
    return shared / union if union else 0.0


def per_view(samples, *values):
    """Rows of flat values for each strong view, as lists of tuples with the region first."""
    counts = [len(boxes) for boxes in samples.boxes]
    split = [v.split(counts) for v in values]
    return [
        list(zip(boxes, *rows, strict=True))
        for boxes, *rows in zip(samples.boxes, *split, strict=True)
    ]
