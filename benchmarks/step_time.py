"""
Where the time of a training step goes on the torchvision host: `python benchmarks/step_time.py`.

All is measured in one process, in turn within each iteration: medians of the parts as shares of
their sum, and whole steps with and without unlabeled images as a ratio. In fp32.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ssod.config import merge_config
from ssod.core.ema import update_ema
from ssod.data.build import build_train_loader
from ssod.data.shapes import ShapesSpec, ensure_shapes
from ssod.hosts.torchvision.config import get_config
from ssod.hosts.torchvision.loop import Trainer


def make_trainer(config: str, root: Path, opts: list[str]) -> Trainer:
    ensure_shapes(root / "shapes", ShapesSpec(num_labeled=24, num_unlabeled=64, num_val=1))
    keys = []
    for group in ("LABELED", "UNLABELED"):
        keys += [f"SSOD.DATA.{group}_JSON", f"{root}/shapes/annotations/{group.lower()}.json"]
        keys += [f"SSOD.DATA.{group}_IMAGES", f"{root}/shapes/images"]
    keys += ["SSOD.DATA.VAL_JSON", "", "SSOD.DATA.UNLABELED_TRUTH_JSON", ""]
    keys += ["SSOD.BURN_IN_ITERS", "0", "OUTPUT_DIR", f"{root}/run"]
    return Trainer(merge_config(get_config(), config, keys + opts))


class Stopwatch:
    """Seconds of named calls, waiting for the device before and after each."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, function: Callable, *args: Any) -> Any:
        self._wait()
        start = time.perf_counter()
        result = function(*args)
        self._wait()
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def medians(self) -> dict[str, float]:
        """Medians after the first two calls of each name."""
        return {name: median(values[2:]) for name, values in self.seconds.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(trainer: Trainer, iterations: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of the parts of a step, and of whole steps with and without unlabeled images."""
    parts, steps = Stopwatch(trainer.device), Stopwatch(trainer.device)
    model, optimizer = trainer.model, trainer.optimizer
    loader = iter(build_train_loader(trainer.cfg, trainer.data, 0))
    for _ in range(iterations + 2):
        batch = parts("data, both streams", next, loader).to(trainer.device)
        losses = parts("student forward, labeled", model.supervised_losses, batch.labeled)
        parts("backward, labeled", sum(losses.values()).backward)
        pseudo = parts("teacher forward and filter", model.pseudo_labels, batch.unlabeled.weak)
        losses = parts(
            "student forward, unlabeled", model.unsupervised_losses, batch.unlabeled, pseudo
        )
        parts("backward, unlabeled", sum(losses.values()).backward)
        parts("optimizer", optimizer.step)
        optimizer.zero_grad()
        parts("EMA", update_ema, model.teacher, model.student, model.ema_decay)
        weight = model.unsup_loss_weight
        steps("semi-supervised", trainer._step, batch)
        model.unsup_loss_weight = 0.0
        steps("supervised", trainer._step, batch)
        model.unsup_loss_weight = weight
    return parts.medians(), steps.medians()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/quickstart.yaml")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        opts = [*args.opts, "SOLVER.MAX_ITER", str(args.iterations + 2)]
        trainer = make_trainer(args.config_file, Path(root), opts)
        parts, steps = measure(trainer, args.iterations)
    total = sum(parts.values())
    for name, value in parts.items():
        print(f"{name:28} {value / total:6.1%}")
    ratio = steps["semi-supervised"] / steps["supervised"]
    print(f"semi-supervised step         {ratio:6.2f} x the supervised step, without data")


if __name__ == "__main__":
    main()
