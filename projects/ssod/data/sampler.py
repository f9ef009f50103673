"""
Which images make up the labeled and the unlabeled batch of each iteration.

A stream is the endless sequence of a set's samples: epoch after epoch, each epoch a permutation
of the set. Position n of a stream always holds the same image, and every batch is a function of
the iteration alone, so there is no state to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ssod.errors import InputError

LABELED, UNLABELED = 0, 1

# Last word of the seeds below. Not 0: seeds that differ by trailing zeros are the same.
_EPOCH, _WINDOW = 1, 2


class SampleKey(NamedTuple):
    """
    One sample of a batch.

    Attributes:
        stream: LABELED or UNLABELED.
        n: position in the stream.
        index: image of the stream's set at that position.
    """

    stream: int
    n: int
    index: int


class TwoStreamSampler(Sampler[list[SampleKey]]):
    """
    Batches of sample keys for iterations `start_iter` to `max_iter - 1`.

    The batch of iteration t does not depend on `start_iter`, and the ranks' batches of t joined in
    order do not depend on `world_size`. No sample is dropped: an epoch visits every image once.

    Images of similar shape are batched together, which saves padding: the batches of a window
    of consecutive stream positions are cut from the window sorted by aspect ratio, and then
    shuffled. Windows span at most a quarter of the set, so that batches of the same few images do
    not recur in every epoch.
    """

    def __init__(
        self,
        labeled_ratios: np.ndarray,
        unlabeled_ratios: np.ndarray | None,
        *,
        labeled_batch: int,
        unlabeled_batch: int,
        burn_in_iters: int,
        seed: int,
        start_iter: int,
        max_iter: int,
        rank: int = 0,
        world_size: int = 1,
        window_batches: int = 16,
    ):
        """
        Check the batch sizes; nothing is drawn yet.

        Args:
            labeled_ratios: (N,) width / height of the labeled images.
            unlabeled_ratios: the same for the unlabeled images; None for labeled batches only.
            labeled_batch: labeled images an iteration, over all ranks.
            unlabeled_batch: the same for unlabeled images; 0 for labeled batches only.
            burn_in_iters: first iteration with unlabeled images.
            seed: non-negative.
            start_iter: first iteration.
            max_iter: iteration to stop before.
            rank: whose slice of every batch to yield.
            world_size: number of ranks.
            window_batches: most batches in a window of the aspect ratio grouping.

        Raises:
            InputError: if a batch size does not fit `world_size`, or a set is empty.
        """
        _check_batch("SOLVER.IMS_PER_BATCH", labeled_batch, world_size, minimum=1)
        _check_batch("SSOD.DATA.UNLABELED_PER_BATCH", unlabeled_batch, world_size, minimum=0)
        window = (window_batches, rank, world_size)
        self._labeled = _Stream(LABELED, labeled_ratios, labeled_batch, seed, *window)
        self._unlabeled = None
        if unlabeled_ratios is not None and unlabeled_batch:
            self._unlabeled = _Stream(UNLABELED, unlabeled_ratios, unlabeled_batch, seed, *window)
        self._burn_in_iters = burn_in_iters
        self._iterations = range(start_iter, max_iter)

    def __len__(self) -> int:
        return len(self._iterations)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for t in self._iterations:
            keys = self._labeled.batch(t)
            if self._unlabeled is not None and t >= self._burn_in_iters:
                keys += self._unlabeled.batch(t - self._burn_in_iters)
            yield keys


class _Stream:
    """The batches of one stream; keeps the current window and permutation."""

    def __init__(
        self,
        stream: int,
        ratios: np.ndarray,
        batch_size: int,
        seed: int,
        window_batches: int,
        rank: int,
        world_size: int,
    ):
        if not len(ratios):
            raise InputError(f"the {['labeled', 'unlabeled'][stream]} set has no images")
        self._stream = stream
        self._ratios = ratios
        self._batch_size = batch_size
        self._seed = seed
        self._window_batches = max(1, min(window_batches, len(ratios) // (4 * batch_size)))
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self._window, self._batches = -1, []

    def batch(self, i: int) -> list[SampleKey]:
        """Return this rank's keys of the stream's i-th batch."""
        window, row = divmod(i, self._window_batches)
        if window != self._window:
            self._window, self._batches = window, self._make_window(window)
        positions, indices = self._batches[row]
        rows = zip(positions[self._slice].tolist(), indices[self._slice].tolist(), strict=True)
        return [SampleKey(self._stream, n, index) for n, index in rows]

    def _make_window(self, window: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (positions, indices) of each batch of a window."""
        size = self._window_batches * self._batch_size
        positions = np.arange(window * size, (window + 1) * size)
        epochs, offsets = np.divmod(positions, len(self._ratios))
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._permutation(int(epoch))[offsets[chosen]]
        # Epochs stay apart, or an image late in one and early in the next would often meet
        # itself in a batch.
        order = np.lexsort((self._ratios[indices], epochs))
        batches = order.reshape(self._window_batches, self._batch_size)
        rng = np.random.default_rng((self._seed, self._stream, window, _WINDOW))
        return [(positions[b], indices[b]) for b in batches[rng.permutation(len(batches))]]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, self._stream, epoch, _EPOCH))
            self._epoch, self._order = epoch, rng.permutation(len(self._ratios))
        return self._order


def _check_batch(key: str, batch: int, world_size: int, minimum: int) -> None:
    if batch < minimum or batch % world_size:
        raise InputError(
            f"{key} is the batch of all ranks and must be a multiple of their number "
            f"{world_size}, at least {minimum * world_size}, got {batch}"
        )
