"""Helpers that also work without a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def get_rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of any shape over ranks, on every rank; a copy in a single process."""
    total = tensor.clone()
    if get_world_size() > 1:
        dist.all_reduce(total)
    return total


def all_gather(block: Tensor) -> Tensor:
    """
    Return every rank's block, exactly and in the order of ranks; a view in a single process.

    Args:
        block: any shape, the same on every rank. Other shapes are an error of the process group's
            backend, or a hang; `TORCH_DISTRIBUTED_DEBUG=DETAIL` names them.

    Returns:
        (world size, *block.shape), the same on every rank.
    """
    if get_world_size() == 1:
        return block[None]
    # Flat, because backends differ in the other shapes that they take.
    gathered = block.new_empty(get_world_size() * block.numel())
    dist.all_gather_into_tensor(gathered, block.flatten())
    return gathered.view(get_world_size(), *block.shape)


def seed_step(seed: int, iteration: int) -> None:
    """
    Seed torch's generators for one training iteration of this rank.

    The hosts' samplers draw from the global generators; making the draws of an iteration depend
    on (seed, iteration, rank) alone is what makes a resumed run equal an uninterrupted one.
    """
    # Distinct below iteration 1,000,003, which is iteration 0 of the next seed, and rank 65,537.
    torch.manual_seed(((seed * 1_000_003 + iteration) * 65_537 + get_rank()) % 2**63)


def step_generator(salt: int) -> torch.Generator:
    """
    Return a generator of its own for one training iteration.

    Others' draws stay as they are.
    """
    return torch.Generator().manual_seed((torch.initial_seed() + salt) % 2**63)
