"""The learning rate, with Detectron2's keys."""

from __future__ import annotations

from fvcore.common.config import CfgNode


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
