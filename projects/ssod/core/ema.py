"""Exponential moving average of a student's weights: the mean teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _paired_state(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    own = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    new = dict(student.named_parameters()) | dict(student.named_buffers())
    unmatched = sorted(own.keys() ^ new.keys())
    unmatched += [name for name in own.keys() & new.keys() if own[name].shape != new[name].shape]
    if unmatched:
        raise ValueError(
            "teacher and student must have the same parameters and buffers, "
            f"unmatched: {unmatched[:5]}"
        )
    return list(own.values()), [new[name].detach() for name in own]


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """
    Update `teacher = decay * teacher + (1 - decay) * student` in place.

    Mean teacher (https://arxiv.org/abs/1703.01780). Floating-point parameters and buffers (the
    statistics of batch normalisation) are averaged in one fused call; other buffers, such as
    counters, are copied. Frozen and trainable tensors are treated alike.

    Args:
        teacher: the averaged model.
        student: a model with the same parameter and buffer names.
        decay: share of the teacher that is kept, in [0, 1); 0 copies the student exactly.

    Raises:
        ValueError: if `decay` is outside [0, 1) or names differ.
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"decay must be in [0, 1), got {decay}. It is the share of the teacher kept at each "
            "update, typically 0.99 to 0.9999."
        )
    pairs = list(zip(*_paired_state(teacher, student), strict=True))
    # `lerp` with weight 1 is not exact for every value, so decay 0 copies.
    floating = [pair for pair in pairs if decay > 0 and pair[0].is_floating_point()]
    if floating:
        averaged, current = zip(*floating, strict=True)
        torch._foreach_lerp_(averaged, current, 1 - decay)
    for own, new in pairs:
        if decay == 0 or not own.is_floating_point():
            own.copy_(new)
