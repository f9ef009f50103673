"""
Where the time of a training step goes on the torchvision host: `python benchmarks/step_time.py`.

All parts are measured in one process, in turn within each iteration; medians are printed as
shares of the semi-supervised step and as ratios to the supervised step.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

from ssod.config import merge_config
from ssod.core.ema import update_ema
from ssod.data.shapes import ShapesSpec, ensure_shapes
from ssod.hosts.torchvision.config import get_config
from ssod.hosts.torchvision.loop import Trainer


def make_trainer(config: str, root: Path, opts: list[str]) -> Trainer:
    ensure_shapes(root / "shapes", ShapesSpec(num_labeled=32, num_unlabeled=64, num_val=1))
    keys = []
    for group in ("LABELED", "UNLABELED"):
        keys += [f"SSOD.DATA.{group}_JSON", f"{root}/shapes/annotations/{group.lower()}.json"]
        keys += [f"SSOD.DATA.{group}_IMAGES", f"{root}/shapes/images"]
    keys += ["SSOD.DATA.VAL_JSON", "", "SSOD.BURN_IN_ITERS", "0", "OUTPUT_DIR", f"{root}/run"]
    return Trainer(merge_config(get_config(), config, keys + opts))


def measure(trainer: Trainer, iterations: int) -> dict[str, float]:
    """Median seconds of each part over `iterations` steps, after two to warm up."""
    seconds = defaultdict(list)
    model, optimizer, device = trainer.model, trainer.optimizer, trainer.device
    loader = iter(trainer._loader(0))

    def timed(name, function, *args):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - start)
        return result

    for _ in range(iterations + 2):
        batch = timed("data, both streams", next, loader).to(device)
        losses = timed("student forward, labeled", model.supervised_losses, batch.labeled)
        timed("backward, labeled", sum(losses.values()).backward)
        pseudo = timed("teacher forward and filter", model.pseudo_labels, batch.unlabeled.weak)
        losses = timed(
            "student forward, unlabeled", model.unsupervised_losses, batch.unlabeled, pseudo
        )
        timed("backward, unlabeled", sum(losses.values()).backward)
        timed("optimizer", optimizer.step)
        optimizer.zero_grad()
        timed("EMA", update_ema, model.teacher, model.student, model.ema_decay)
    return {name: median(values[2:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/quickstart.yaml")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        opts = [*args.opts, "SOLVER.MAX_ITER", str(args.iterations + 2)]
        parts = measure(make_trainer(args.config_file, Path(root), opts), args.iterations)
    total = sum(parts.values())
    supervised = sum(
        parts[name] for name in ("student forward, labeled", "backward, labeled", "optimizer")
    )
    for name, value in parts.items():
        print(f"{name:28} {value / total:6.1%} of the step")
    print(f"{'semi-supervised step':28} {total / supervised:6.2f} x the supervised step")


if __name__ == "__main__":
    main()
