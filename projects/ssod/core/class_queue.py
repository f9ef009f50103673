"""
The last embeddings of each class, as many of a rare class as of a frequent one.

Shape shorthand: R regions of all images, K foreground classes, D embedding size, L places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassQueue(nn.Module):
    """
    First-in-first-out queue of embeddings for each class, and their means, the prototypes.

    The balanced queue of DASO (https://arxiv.org/abs/2106.05682), of its last L boxes of a class.
    A place holds the sum and the number of an iteration's boxes of the class over all ranks, so
    that the queue depends neither on how many ranks and parts a batch is divided among, nor on the
    order of its boxes. A prototype is the mean of the class's last iterations that have L boxes
    between them: every box counts the same, and at the far end a whole iteration is taken.

    `add` gathers boxes, which count from the next `close` on.

    Args:
        num_classes: K.
        length: L, at least 1.
        num_values: D.
    """

    sums: Tensor
    counts: Tensor
    next_place: Tensor
    open_sums: Tensor
    open_counts: Tensor

    def __init__(self, num_classes: int, length: int, num_values: int):
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, length, num_values))
        # Whole numbers, of which a GPU makes running sums in a fixed order.
        self.register_buffer("counts", torch.zeros(num_classes, length, dtype=torch.int64))
        self.register_buffer("next_place", torch.zeros(num_classes, dtype=torch.int64))
        open_sums = torch.zeros(num_classes, num_values, dtype=torch.float64)
        self.register_buffer("open_sums", open_sums)
        self.register_buffer("open_counts", torch.zeros(num_classes, dtype=torch.float64))

    def sum_by_class(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """
        Return what `add` takes, of (R, D) embeddings of (R,) classes; R = 0 gives zeros.

        Rows that are not finite are left out. Returns (K, D + 1) float64, the number last.
        """
        is_finite = embeddings.isfinite().all(1)
        rows = embeddings.double().masked_fill(~is_finite[:, None], 0)
        labels = torch.arange(len(self.counts), device=classes.device)
        # A product with this (K, R) matrix adds in a fixed order; index_add_ does not on a GPU.
        member = ((classes == labels[:, None]) & is_finite).double()
        return torch.cat([member @ rows, member.sum(1, keepdim=True)], 1)

    def add(self, sums: Tensor) -> None:
        """Gather boxes of the current iteration: (K, D + 1) of `sum_by_class`, over all ranks."""
        self.open_sums += sums[:, :-1]
        self.open_counts += sums[:, -1]

    def close(self) -> None:
        """Push what was gathered; a class without boxes keeps its places."""
        has_boxes = self.open_counts > 0
        classes = torch.arange(len(has_boxes), device=has_boxes.device)
        place = (classes, self.next_place)
        # By values: a choice of rows would wait for the device.
        self.sums[place] = torch.where(
            has_boxes[:, None], self.open_sums.to(self.sums), self.sums[place]
        )
        self.counts[place] = torch.where(has_boxes, self.open_counts.long(), self.counts[place])
        self.next_place.copy_((self.next_place + has_boxes) % self.counts.shape[1])
        self.open_sums.zero_()
        self.open_counts.zero_()

    def seen(self) -> Tensor:
        """Return (K,) bool: which classes have a prototype."""
        return self.counts.sum(1) > 0

    def prototypes(self) -> Tensor:
        """Return (K, D) float32 means; zeros for a class without boxes."""
        length = self.counts.shape[1]
        # The place of each age, and as well the age of each place.
        age = (self.next_place[:, None] - 1 - torch.arange(length, device=self.counts.device)) % (
            length
        )
        by_age = self.counts.gather(1, age)
        is_used = (by_age.cumsum(1) - by_age < length).gather(1, age)
        total = (self.counts * is_used).sum(1).clamp(min=1)
        with torch.autocast(self.sums.device.type, enabled=False):
            return (is_used.to(self.sums)[:, None] @ self.sums)[:, 0] / total[:, None]
