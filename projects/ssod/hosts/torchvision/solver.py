"""Optimizer and learning rate, with Detectron2's keys."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod.errors import InputError


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build `SSOD.OPTIMIZER` over what is trainable; norms decay by `WEIGHT_DECAY_NORM`."""
    solver = cfg.SOLVER
    norms, others = [], []
    for module in model.modules():
        group = norms if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) else others
        group += [p for p in module.parameters(recurse=False) if p.requires_grad]
    parameters = [
        {"params": others, "weight_decay": solver.WEIGHT_DECAY},
        {"params": norms, "weight_decay": solver.WEIGHT_DECAY_NORM},
    ]
    if cfg.SSOD.OPTIMIZER == "SGD":
        return torch.optim.SGD(parameters, solver.BASE_LR, momentum=solver.MOMENTUM)
    if cfg.SSOD.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(parameters, solver.BASE_LR, fused=True)
    raise InputError(f'SSOD.OPTIMIZER must be "SGD" or "AdamW", got {cfg.SSOD.OPTIMIZER!r}')


def learning_rate(cfg: CfgNode, iteration: int) -> float:
    """
    Learning rate of an iteration: linear warm-up, then a factor GAMMA at each of STEPS.

    A function of the iteration alone, so there is no scheduler state to resume.
    """
    solver = cfg.SOLVER
    lr = solver.BASE_LR * solver.GAMMA ** sum(iteration >= step for step in solver.STEPS)
    if iteration < solver.WARMUP_ITERS:
        progress = iteration / solver.WARMUP_ITERS
        lr *= solver.WARMUP_FACTOR * (1 - progress) + progress
    return lr
