"""The 8 x 8 digits of scikit-learn, as data to learn from few labels, and their two views."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

NUM_TEST, NUM_VALIDATION = 40, 20  # images of each class
# Of the weak view and the strong one: degrees, and shares or pixels up to which images are changed.
WEAK = {"degrees": 0, "scale": 0, "pixels": 0.5, "noise": 0.05, "cutout": 0}
STRONG = {"degrees": 25, "scale": 0.2, "pixels": 1, "noise": 0.2, "cutout": 3}
Data = list[tuple[Tensor, Tensor]]  # images and classes; labeled, unlabeled, test


def distort(
    images: Tensor, degrees: float, scale: float, pixels: float, noise: float, cutout: int
) -> Tensor:
    """Turn, scale and shift each image at random, add noise and grey out a square."""
    count, size = len(images), images.shape[-1]

    def between(bound: float) -> Tensor:
        return bound * (2 * torch.rand(count) - 1)

    turn = torch.deg2rad(between(degrees))
    cos, sin = (1 + between(scale)) * torch.stack([turn.cos(), turn.sin()])
    shift_x, shift_y = between(2 * pixels / size), between(2 * pixels / size)
    matrix = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], 1).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    images = images + noise * torch.randn_like(images)
    corner = torch.randint(0, size - cutout + 1, (2, count, 1))
    steps = torch.arange(size)
    rows, columns = ((steps >= at) & (steps < at + cutout) for at in corner)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.5)


def long_tail(most: int, imbalance: float) -> list[int]:
    return [round(most * imbalance ** (-k / 9)) for k in range(10)]


def draw_data(labeled: list[int], unlabeled: list[int], seed: int, validation: bool) -> Data:
    """Return images (N, 1, 8, 8) in [0, 1]; a class without labels is not in the test."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    found = []
    for label, digit in enumerate(rng.permutation(10)):
        # The same test images for all seeds, so that no seed's validation has seen them.
        test, rest = np.split(np.flatnonzero(digits.target == digit), [NUM_TEST])
        ends = np.cumsum([NUM_VALIDATION, labeled[label], unlabeled[label]])
        held_out, *drawn, _ = np.split(rng.permutation(rest), ends)
        measured = held_out if validation else test
        found.append((*drawn, measured if labeled[label] else measured[:0]))
    images = torch.from_numpy(digits.images / 16).float()[:, None]
    data = []
    for rows in zip(*found, strict=True):
        sizes = torch.tensor([len(part) for part in rows])
        data.append((images[np.concatenate(rows)], torch.arange(10).repeat_interleave(sizes)))
    return data
