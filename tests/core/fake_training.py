"""Training with the fake detector: its batches, and the product's step."""

import torch
from fake_detector import NUM_CLASSES

from ssod.config import merge_config
from ssod.core.structures import Targets, TwoStreamBatch, Views
from ssod.hosts.step import TrainingStep
from ssod.hosts.torchvision.build import build_optimizer
from ssod.hosts.torchvision.defaults import get_config


def make_images(generator, count):
    shape = (count, 3, 4, 4)
    return list(torch.randint(256, shape, dtype=torch.uint8, generator=generator))


def make_batch(seed=0, unlabeled=True):
    """Two labeled images with one and two boxes, three unlabeled ones; no two images are equal."""
    generator = torch.Generator().manual_seed(seed)
    targets = [
        Targets.from_ground_truth(
            torch.rand(count, 4, generator=generator),
            torch.randint(NUM_CLASSES, (count,), generator=generator),
            NUM_CLASSES,
        )
        for count in (1, 2)
    ]
    labeled = Views(make_images(generator, 2), make_images(generator, 2), targets, [1, 2])
    views = Views(make_images(generator, 3), make_images(generator, 3), None, [3, 4, 5])
    return TwoStreamBatch(labeled, views if unlabeled else None, [])


def training_step(model, *overrides):
    """The product's step of a model, with `KEY, VALUE, ...` overrides."""
    options = ["MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", 0.02, "SOLVER.WEIGHT_DECAY", 0, *overrides]
    cfg = merge_config(get_config(), "", [str(option) for option in options])
    return TrainingStep(cfg, model, build_optimizer(cfg, model), data=None)


def train(step, iterations):
    """Train on a batch an iteration, seeded by it; returns the metrics of each."""
    metrics = []
    for _ in range(iterations):
        step.prepare()
        step(make_batch(step.model.iteration))
        metrics.append(step.read_metrics())
    return metrics


def trained(model, iterations):
    """The model after some iterations."""
    train(training_step(model), iterations)
    return model
