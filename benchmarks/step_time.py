"""
Where the time of a training step goes, on either host: `python benchmarks/step_time.py`.

All is measured in one process, in turn within each iteration: the medians of a step's parts as
shares of their sum, and whole steps as ratios to each other, with their quartiles. On Detectron2 a
supervised step is also compared with that of Detectron2's own trainer and `GeneralizedRCNN`, with
the same weights, images and optimizer. What that one lacks, and the ratio includes, is the EMA,
the gradient norm, the clipping, and the guard against gradients that are not finite; only that
one writes metrics at every step. With methods such as `SSOD.LSM.ENABLED True` a semi-supervised
step is also compared with the same one without them.

The memory of whole steps is the most that CUDA has allocated. On a CPU it is counted: parameters,
gradients, the optimizer's state, and all tensors that are kept for the backward.

`SOLVER.AMP.ENABLED True` measures mixed precision. A detector that knows nothing makes no
pseudo-labels; `MODEL.WEIGHTS` names one that does. The batches of a config go through one process:
for a recipe of several GPUs set `SOLVER.IMS_PER_BATCH` and `SSOD.DATA.UNLABELED_PER_BATCH` to the
share of one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hosts import Host, build_host
from ssod.cli.common import run_command
from ssod.core.structures import TwoStreamBatch

WARM_UP = 3  # iterations that are not counted
DATA = "data, both streams"
SEMI, SUPERVISED, PLAIN = "semi-supervised step", "supervised step", "plain Detectron2's step"
NO_METHODS = "step without methods"


class Stopwatch:
    """Seconds of named calls, waiting for the device; one within another counts for itself only."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)  # of each iteration
        self._current: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    def __call__(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        outer, self._inner = self._inner, 0.0
        self._wait()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self._wait()
        elapsed = time.perf_counter() - start
        self._current[name] += elapsed - self._inner
        self._inner = outer + elapsed
        return result

    def patch(self, name: str, owner: Any, method: str) -> AbstractContextManager:
        """Measure a method whenever it is called."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            return self(name, function, *args, **kwargs)

        return patch.object(owner, method, timed)

    def end_iteration(self) -> None:
        for name, seconds in self._current.items():
            self.seconds[name].append(seconds)
        self._current.clear()

    def counted(self, name: str) -> list[float]:
        """Seconds of each iteration after the warm-up."""
        return self.seconds[name][WARM_UP:]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run_parts(host: Host, parts: Stopwatch, batches: Iterator[TwoStreamBatch]) -> TwoStreamBatch:
    """A whole step whose parts are measured; returns its batch."""
    model, step = host.model, host.step
    batch = parts(DATA, next, batches)
    with ExitStack() as stack:
        for name, owner, method in (
            (DATA, TwoStreamBatch, "to"),
            ("student forward, labeled", model, "supervised_losses"),
            ("teacher forward and filter", model, "detect"),
            ("teacher forward and filter", model.pseudo_label_filter, "forward"),
            ("student forward, unlabeled", model, "unsupervised_losses"),
            *((f"{n}, forward", m, "losses") for n, m in model.methods.items()),
            ("backward", Tensor, "backward"),
            ("unscale, norm, clipping", step, "_update"),
            ("optimizer", step.optimizer, "step"),
            ("EMA", model, "after_step"),
        ):
            stack.enter_context(parts.patch(name, owner, method))
        parts("the rest", host.train, batch)
    parts.end_iteration()
    return batch


def run_supervised(host: Host, batch: TwoStreamBatch) -> None:
    """A whole step on the labeled images of a batch."""
    with patch.object(host.model, "unsup_loss_weight", 0.0):
        host.train(replace(batch, unlabeled=None))


def run_without_methods(host: Host, batch: TwoStreamBatch) -> None:
    """A whole step of the mean teacher."""
    with patch.object(host.model, "methods", nn.ModuleDict()):
        host.train(batch)


def list_steps(host: Host) -> dict[str, Callable[[TwoStreamBatch], Any]]:
    """The host's own whole steps."""
    steps = {SEMI: host.train, SUPERVISED: partial(run_supervised, host)}
    if host.model.methods:
        steps[NO_METHODS] = partial(run_without_methods, host)
    return steps


def measure_memory(host: Host, batches: Iterator[TwoStreamBatch]) -> dict[str, float]:
    """MiB that whole steps need at most, all that a run holds included."""
    peaks: dict[str, float] = defaultdict(float)
    measure = _allocated if host.device.type == "cuda" else _counted
    for batch in islice(batches, WARM_UP):
        for name, step in list_steps(host).items():
            peaks[name] = max(peaks[name], measure(host, partial(step, batch)) / 2**20)
    return peaks


def _allocated(host: Host, step: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats(host.device)
    step()
    return torch.cuda.max_memory_allocated(host.device)


def _counted(host: Host, step: Callable[[], None]) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    for tensor in chain(host.model.parameters(), host.model.buffers()):
        keep(tensor)
        if tensor.grad is not None:
            keep(tensor.grad)
    for state in host.step.optimizer.state.values():
        for tensor in filter(torch.is_tensor, state.values()):
            keep(tensor)
    return sum(kept.values())


def measure_time(
    host: Host, batches: Iterator[TwoStreamBatch], iterations: int
) -> tuple[Stopwatch, Stopwatch, float]:
    """Times of the parts of a step, those of whole steps, and the pseudo-labels of an image."""
    parts, steps, counts = Stopwatch(host.device), Stopwatch(host.device), []
    prepare_plain = host.build_plain and host.build_plain()
    # No gradients are freed here: the next step would pay for getting the memory again.
    for i in range(WARM_UP + iterations):
        batch = run_parts(host, parts, batches)
        steps(SEMI, host.train, batch)
        counts.append(host.model.metrics["pseudo/num_per_image"].item())
        compared = [(name, partial(step, batch)) for name, step in list_steps(host).items()][1:]
        if prepare_plain:
            compared.append((PLAIN, prepare_plain(batch.labeled)))
        for name, step in compared if i % 2 else reversed(compared):  # neither is always first
            steps(name, step)
        steps.end_iteration()
        host.step.read_metrics()  # they would pile up
    return parts, steps, mean(counts[WARM_UP:])


def report(parts: Stopwatch, steps: Stopwatch) -> None:
    """Print the shares and the ratios."""
    medians = {name: median(parts.counted(name)) for name in parts.seconds}
    for name, value in medians.items():
        print(f"{name:28} {value / sum(medians.values()):6.1%}")
    without_data = [parts.counted(name) for name in parts.seconds if name != DATA]
    sums = [sum(values) for values in zip(*without_data, strict=True)]
    for name, label, base in (
        (SEMI, "the sum of its parts, without data", sums),
        (SEMI, f"the {SUPERVISED}", steps.counted(SUPERVISED)),
        (SEMI, f"the {NO_METHODS}", steps.counted(NO_METHODS)),
        (SUPERVISED, PLAIN, steps.counted(PLAIN)),
    ):
        if base:
            pairs = zip(steps.counted(name), base, strict=True)
            low, mid, high = quantiles([a / b for a, b in pairs], n=4)
            print(f"{name:28} {mid:6.2f} x {label} (quartiles {low:.2f} and {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/quickstart.yaml")
    parser.add_argument("--iterations", type=int, default=15, help="counted, at least 2")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    if args.iterations < 2:
        parser.error("--iterations must be at least 2")
    with tempfile.TemporaryDirectory() as root:
        host = build_host(args.config_file, Path(root), 2 * WARM_UP + args.iterations, args.opts)
        threads = torch.get_num_threads()
        print(f"{host.name} on {host.device}, torch {torch.__version__}, {threads} CPU thread(s)")
        with host.context:
            batches = iter(host.loader)
            peaks = measure_memory(host, batches)
            parts, steps, num_pseudo_labels = measure_time(host, batches, args.iterations)
    report(parts, steps)
    print(f"{'pseudo-labels per image':28} {num_pseudo_labels:6.2f}")
    for name, value in peaks.items():
        print(f"{name:28} {value:6.0f} MiB, {value / peaks[SEMI]:.2f} of the {SEMI}")


if __name__ == "__main__":
    sys.exit(run_command(main))
