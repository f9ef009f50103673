"""A tiny run of each host that is installed, as the product makes it."""

from importlib import import_module
from importlib.util import find_spec

import torch

from ssod.hosts.metric_log import read_metrics

HOSTS = ["torchvision"] + ["detectron2"] * (find_spec("detectron2") is not None)
# What Detectron2 measures of time, and what it smooths over iterations.
UNSTABLE = ("time", "data_time", "eta_seconds", "rank_data_time", "rpn/", "roi_head/", "unsup")


class Host:
    """
    The tiny run of one host.

    Args:
        name: of the host.
        shapes: folder of the data.
        *keys: `KEY, VALUE, ...` of all runs.
    """

    def __init__(self, name, shapes, *keys):
        self.name = name
        self.keys = keys
        self.module = import_module(f"ssod.hosts.{name}.run")
        tiny = import_module("tiny_detectron2" if name == "detectron2" else "tiny_run")
        self.config = lambda output, *more: tiny.tiny_config(shapes, output, *keys, *more)

    def open(self, output, *overrides):
        """Return the run in a folder, to be trained from where it is."""
        cfg = self.config(output, *overrides)
        return self.module.Run(cfg, self.module.find_checkpoint(str(output)))

    def train(self, output, *overrides):
        """Train up to the end, from where it was; returns the run."""
        run = self.open(output, *overrides)
        run.train()
        return run

    def read(self, output):
        """Return the content of the run's checkpoint, the training's state at its top."""
        state = torch.load(self.module.find_checkpoint(str(output)), weights_only=True)
        return state | state.pop("trainer", {})


def read_lines(output):
    """Return the lines of a log in order, without what is measured of time."""
    lines = sorted(read_metrics(output), key=lambda line: line["iteration"])
    return [{k: v for k, v in line.items() if not k.startswith(UNSTABLE)} for line in lines]


def read_losses(output):
    """Return those lines after the burn-in."""
    return [line for line in read_lines(output) if any(k.endswith("_unsup") for k in line)]
