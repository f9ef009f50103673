"""Optimizer and gradient clipping of every host, with Detectron2's keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_

from ssod.errors import InputError

Clipper = Callable[[Sequence[nn.Parameter], Tensor], object]


def build_optimizer(
    cfg: CfgNode, groups: list[dict[str, Any]], **sgd_options: Any
) -> torch.optim.Optimizer:
    """
    Build `SSOD.OPTIMIZER` over a host's parameter groups.

    The fused kernels are used because they skip a step on the device, without asking the host
    whether gradients are finite.

    Args:
        cfg: `SOLVER` and `SSOD.OPTIMIZER`.
        groups: of everything that is trainable, with what differs from `SOLVER.BASE_LR` and
            `WEIGHT_DECAY`.
        **sgd_options: of `torch.optim.SGD`.

    Raises:
        InputError: for an optimizer that does not exist.
    """
    solver = cfg.SOLVER
    shared = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "fused": True}
    if cfg.SSOD.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(groups, momentum=solver.MOMENTUM, **shared, **sgd_options)
        # The fused kernel leaves the buffers of a skipped first step uninitialised. From zero,
        # the first step is the same: dampening is 0.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if cfg.SSOD.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, **shared)
    raise InputError(f'SSOD.OPTIMIZER must be "SGD" or "AdamW", got {cfg.SSOD.OPTIMIZER!r}')


def build_clipper(cfg: CfgNode) -> Clipper | None:
    """
    Return the function that clips gradients in place, None if they are not to be clipped.

    `SOLVER.CLIP_GRADIENTS.CLIP_TYPE` is one of Detectron2's, "value" for each element and "norm"
    for each parameter, or "full_model" for the norm of all parameters together. The function takes
    the parameters and the norm of all their gradients, 0-dim.

    Raises:
        InputError: for another type, or a `NORM_TYPE` that it does not have.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.CLIP_TYPE == "full_model" and clip.NORM_TYPE != 2:
        raise InputError(
            "SOLVER.CLIP_GRADIENTS.NORM_TYPE must be 2.0 with CLIP_TYPE full_model, got "
            f"{clip.NORM_TYPE}"
        )
    if not clip.ENABLED:
        return None
    if clip.CLIP_TYPE == "full_model":
        return lambda parameters, norm: clip_grads_with_norm_(parameters, clip.CLIP_VALUE, norm)
    if clip.CLIP_TYPE == "value":
        return lambda parameters, norm: clip_grad_value_(parameters, clip.CLIP_VALUE)
    if clip.CLIP_TYPE == "norm":
        return lambda parameters, norm: [
            clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE) for parameter in parameters
        ]
    raise InputError(
        'SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be "value", "norm" or "full_model", '
        f"got {clip.CLIP_TYPE!r}"
    )
