"""
Statistics that filters gather in training: buffers, with how each is reduced over ranks.

Everything here is the same on every rank, because what it is fed is: the caller adds a batch's
sums over ranks first (`RunningSums`, `RunningAverage`), or the class does so (`ScoreQueue`).

Shape shorthand: N images, R detections, K foreground classes, G groups of detections (one, or
the classes), V values of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssod.core.distributed import all_gather
from ssod.core.structures import Detections


class RunningSums(nn.Module):
    """
    Exponential moving average of counts and sums, for averages in which detections weigh equally.

    A group's average is its sum over its count, both decayed alike. So it needs no correction for
    its start, and a batch with one detection or none no special case.

    Args:
        num_groups: G.
        num_values: V.
        decay: share of the old sums kept at each update, in [0, 1).
        keep_absent: leave a group without detections as it is. Otherwise its sums decay, which
            keeps its averages but gives the next detections more influence.
    """

    sums: Tensor

    def __init__(self, num_groups: int, num_values: int, decay: float, keep_absent: bool = False):
        super().__init__()
        self.decay = decay
        self.keep_absent = keep_absent
        sums = torch.zeros(num_groups, 1 + num_values, dtype=torch.float64)
        self.register_buffer("sums", sums)

    def update(self, batch: Tensor) -> None:
        """
        Add a batch.

        Args:
            batch: (G, 1 + V) number of detections and sums of their values, over all ranks.
        """
        decay = torch.full_like(self.sums[:, :1], self.decay)
        if self.keep_absent:
            decay = decay.masked_fill(batch[:, :1] == 0, 1.0)
        self.sums.mul_(decay).add_((1 - decay) * batch)

    def seen(self) -> Tensor:
        """Return (G,) bool: which groups ever had a detection."""
        return self.sums[:, 0] > 0

    def averages(self) -> Tensor:
        """Return (G, V) float64; zeros for a group that never had a detection."""
        return self.sums[:, 1:] / torch.where(self.seen(), self.sums[:, 0], 1.0)[:, None]


class RunningAverage(nn.Module):
    """
    Exponential moving average of batch values: every batch weighs the same, of whatever size.

    Args:
        num_groups: G.
        num_values: V.
        decay: share of the old average kept at each update, in [0, 1).
        initial: V values that every group starts from. None: from its first batch.
    """

    values: Tensor
    started: Tensor

    def __init__(
        self,
        num_groups: int,
        num_values: int,
        decay: float,
        initial: Sequence[float] | None = None,
    ):
        super().__init__()
        self.decay = decay
        start = torch.tensor(initial or [0.0] * num_values, dtype=torch.float64)
        self.register_buffer("values", start.repeat(num_groups, 1))
        self.register_buffer("started", torch.full((num_groups, num_values), initial is not None))

    def update(self, batch: Tensor, valid: Tensor) -> None:
        """
        Add a batch.

        Args:
            batch: (G, V) values over all ranks; anything, also NaN, where they are not valid.
            valid: (G, V) or (G, 1) bool. The other averages stay as they are.
        """
        moved = torch.where(
            self.started, self.decay * self.values + (1 - self.decay) * batch, batch
        )
        self.values.copy_(torch.where(valid, moved, self.values))
        self.started.logical_or_(valid)

    def seen(self) -> Tensor:
        """Return (G,) bool: which groups have a value for everything."""
        return self.started.all(1)

    def averages(self) -> Tensor:
        """Return (G, V) float64; zeros before the first batch if nothing else was given."""
        return self.values.clone()


class ScoreQueue(nn.Module):
    """
    Scores and classes of the detections of the last images, over all ranks.

    Args:
        num_classes: K; empty places of the queue have this class, the background.
        num_images: images to remember.
        max_detections: best detections of an image to remember.
    """

    rows: Tensor

    def __init__(self, num_classes: int, num_images: int, max_detections: int):
        super().__init__()
        self.num_classes = num_classes
        # Both as float32, in which classes up to 2^24 are exact: one gather for both.
        self.register_buffer("rows", self._empty(torch.empty(0), num_images, max_detections))
        self.next_row = 0
        self.num_filled = 0

    def get_extra_state(self) -> Tensor:
        """Return (2,) position and images in the ring; on the device reading it would be a sync."""
        return torch.tensor([self.next_row, self.num_filled])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.next_row, self.num_filled = state.tolist()

    def _empty(self, like: Tensor, num_images: int, max_detections: int) -> Tensor:
        rows = like.new_zeros(num_images, max_detections, 2, dtype=torch.float32)
        rows[..., 1] = self.num_classes
        return rows

    def push(self, detections: list[Detections]) -> None:
        """
        Add the images of all ranks, of (R,) detections each; as many images on every rank.

        Of an image with more than `max_detections` detections the best are taken. One gather, of
        the same length with and without detections.
        """
        capacity, max_detections, _ = self.rows.shape
        block = self._empty(self.rows, len(detections), max_detections)
        for row, image in zip(block, detections, strict=True):
            scores, classes = image.scores, image.classes
            if len(image) > max_detections:
                best = scores.argsort(descending=True, stable=True)[:max_detections]
                scores, classes = scores[best], classes[best]
            row[: len(scores), 0] = scores
            row[: len(scores), 1] = classes.to(row)
        images = all_gather(block).flatten(0, 1)[-capacity:]
        places = torch.arange(self.next_row, self.next_row + len(images), device=images.device)
        self.rows[places % capacity] = images
        self.next_row = (self.next_row + len(images)) % capacity
        self.num_filled = min(self.num_filled + len(images), capacity)

    def scores_and_classes(self) -> tuple[Tensor, Tensor]:
        """Return (R,) float32 scores and int64 classes in [0, K], K in empty places; maybe none."""
        scores, classes = self.rows[: self.num_filled].flatten(0, 1).unbind(1)
        return scores, classes.long()


class LabelDistribution(nn.Module):
    """
    Number of labeled boxes of each class, and of labeled images.

    Args:
        num_classes: K.
    """

    class_counts: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64))
        self.num_labeled = 0

    def get_extra_state(self) -> Tensor:
        """Return the scalar number of labeled images, for the checkpoint."""
        return torch.tensor(self.num_labeled)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.num_labeled = int(state)

    def set(self, class_counts: Tensor, num_labeled: int) -> None:
        """
        Remember the labels of a data set; call it before training, with the same on every rank.

        Args:
            class_counts: (K,) labeled boxes of each class.
            num_labeled: labeled images.

        Raises:
            ValueError: for another shape, a negative count, or no labeled image.
        """
        if class_counts.shape != self.class_counts.shape or bool((class_counts < 0).any()):
            raise ValueError(
                f"class_counts must be {len(self.class_counts)} numbers of boxes, one a class, "
                f"got {class_counts.tolist()}"
            )
        if num_labeled < 1:
            raise ValueError(f"num_labeled must be at least 1 image, got {num_labeled}")
        self.class_counts.copy_(class_counts)
        self.num_labeled = int(num_labeled)

    def check_known(self, user: str) -> None:
        """Raise ValueError, naming the filter, if the labels were never told."""
        if self.num_labeled == 0:
            raise ValueError(
                f"{user} needs the number of labeled boxes of each class: "
                "call its set_label_distribution before training"
            )
