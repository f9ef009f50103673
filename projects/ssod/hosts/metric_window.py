"""Scalars of some iterations, which are reduced over ranks and copied to the host together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssod.core.distributed import all_reduce_sum, get_world_size


class MetricWindow:
    """
    What a training has measured since the last `read`, on the device.

    Every rank adds the same names, and reads at the same iterations.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._flags: list[Tensor] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Add 0-dim tensors of an iteration, or of a part of one."""
        for name, value in values.items():
            self._values[name].append(value.detach())

    def add_flag(self, flag: Tensor) -> None:
        """Add a 0-dim bool of an iteration, the same on every rank."""
        self._flags.append(flag)

    def state_dict(self) -> dict[str, Any]:
        """Return what was added on this rank, so that a resumed run writes what it would have."""
        values = {name: torch.stack(found).cpu() for name, found in self._values.items()}
        flags = torch.stack(self._flags).tolist() if self._flags else []
        return {"values": values, "flags": flags}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned; on other ranks, too, as if it had been theirs."""
        for name, found in state["values"].items():
            self._values[name] = list(found.to(device))
        self._flags = list(torch.tensor(state["flags"], device=device))

    def read(
        self, counts: Sequence[int], seconds: dict[str, float]
    ) -> tuple[dict[str, float], list[bool], list[int]]:
        """
        Reduce and forget everything, with counts and seconds of this rank; waits for the device.

        Returns:
            the means over iterations and ranks, of finite values (nan if there are none), with the
            `seconds` of the slowest rank; the flags of each iteration; the sums of the counts.
        """
        names = sorted(self._values)
        means = [_finite_mean(torch.stack(self._values[name])).double() for name in names]
        flags = torch.stack(self._flags).double()
        sums = torch.cat([torch.stack(means), flags, flags.new_tensor(counts)])
        slowest = flags.new_tensor(list(seconds.values()))
        sums = all_reduce_sum(sums)
        if get_world_size() > 1 and seconds:
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found, world_size = torch.cat([sums, slowest]).tolist(), get_world_size()
        ends = (len(names), len(names) + len(flags), len(sums))
        values = {n: v / world_size for n, v in zip(names, found[: ends[0]], strict=True)}
        values = _divide_sums(values) | dict(zip(seconds, found[ends[2] :], strict=True))
        finite = [total == world_size for total in found[ends[0] : ends[1]]]
        self._values.clear()
        self._flags.clear()
        return values, finite, [round(total) for total in found[ends[1] : ends[2]]]


def _finite_mean(values: Tensor) -> Tensor:
    finite = values.isfinite()
    return values.where(finite, 0).sum() / finite.sum()


def _divide_sums(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the sums an image of `TeacherStudent`, averaged, by the mean score and weight."""
    divided = dict(metrics)
    count = metrics.get("pseudo/num_per_image")
    for name in ("score", "weight"):
        total = divided.pop(f"pseudo/{name}_per_image", None)
        if count:
            divided[f"pseudo/mean_{name}"] = total / count
    return divided
