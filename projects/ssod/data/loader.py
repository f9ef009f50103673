"""The loaders of training batches and of images to evaluate, and the count of broken files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssod.core.structures import Targets, TwoStreamBatch, Views
from ssod.data import photometric
from ssod.data.records import DetectionDataset
from ssod.data.sampler import LABELED, TwoStreamSampler
from ssod.data.samples import EvaluationDataset, TrainingSample, TwoStreamDataset
from ssod.errors import InputError

logger = logging.getLogger(__name__)

_MIN_DRAWN = 100  # samples before a share of failures means anything


def build_two_stream_loader(
    labeled: DetectionDataset,
    unlabeled: DetectionDataset | None,
    *,
    seed: int,
    min_sizes: Sequence[int],
    max_size: int,
    flip: bool,
    num_workers: int,
    size_range: bool = False,
    independent: bool = False,
    warp: bool = False,
    pin_memory: bool = False,
    labeled_strong: bool = True,
    second_strong: bool = False,
    **sampling: int,
) -> DataLoader:
    """
    Return the loader of the `TwoStreamBatch` of each iteration of a training.

    Before `burn_in_iters` no unlabeled image is decoded and `unlabeled` of the batches is None.
    Labeled images without boxes are used, with M = 0 targets. For the arguments see `make_views`,
    and for those in `sampling` `TwoStreamSampler`. Without `labeled_strong` the strong views of
    labeled images are neither made nor sent, and their list is empty. With `second_strong`
    unlabeled images have another strong view, which changes no other draw.

    Raises:
        InputError: for batch sizes that do not fit `world_size` and empty sets. While iterating:
            if several images in a row cannot be decoded, or a labeled image has not the size in
            its annotations.
    """
    ratios = None if unlabeled is None else unlabeled.aspect_ratios
    sampler = TwoStreamSampler(labeled.aspect_ratios, ratios, seed=seed, **sampling)
    dataset = TwoStreamDataset(
        labeled,
        unlabeled,
        seed=seed,
        min_sizes=min_sizes,
        max_size=max_size,
        flip=flip,
        size_range=size_range,
        independent=independent,
        warp=warp,
        labeled_strong=labeled_strong,
        second_strong=second_strong,
    )
    return BatchLoader(
        dataset,
        partial(_collate, num_classes=labeled.num_classes),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def build_test_loader(
    dataset: DetectionDataset,
    *,
    min_size: int,
    max_size: int,
    batch_size: int,
    num_workers: int,
    skip_broken: bool = False,
) -> DataLoader:
    """
    Return the loader of lists of at most `batch_size` `EvaluationItem`, in the set's order.

    With `skip_broken` images that cannot be decoded are left out, and sizes are not checked.

    Raises:
        InputError: while iterating, if an image cannot be decoded or has not the size in its
            annotations: a score without it would not be comparable.
    """
    return BatchLoader(
        EvaluationDataset(dataset, min_size, max_size, skip_broken),
        _without_none,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def first_samples(loader: DataLoader, count: int) -> tuple[list[TrainingSample], ...]:
    """
    Return the first samples that a training will draw, one at a time and without workers.

    Args:
        loader: of `build_two_stream_loader`. If its unlabeled set has boxes, the samples have them,
            in pixels of their views; batches never do.
        count: samples of each stream.

    Returns:
        At most `count` labeled and unlabeled samples; none of a stream that the first iteration of
        the loader does not use.

    Raises:
        InputError: as the loader.
    """
    found: tuple[list[TrainingSample], ...] = ([], [])
    for keys in loader.batch_sampler:
        for key in keys:
            if len(found[key.stream]) < count:
                found[key.stream].append(loader.dataset.samples[key])
        if all(len(found[key.stream]) == count for key in keys):
            break
    return found


class FailedImages:
    """
    Counts the image files that could not be decoded in a training, on one rank.

    Attributes:
        num_failed: samples drawn that failed.
        num_drawn: samples drawn.
    """

    def __init__(self, max_share: float):
        """Start at zero; `max_share`, in [0, 1], of the samples drawn may fail."""
        self._max_share = max_share
        self._files: set[str] = set()
        self.num_failed = 0
        self.num_drawn = 0

    def update(self, batch: TwoStreamBatch) -> None:
        """Count a batch and warn of each failing file once."""
        for file_name in batch.failed:
            if file_name not in self._files:
                logger.warning("%s cannot be decoded; another image replaces it", file_name)
                self._files.add(file_name)
        self.num_failed += len(batch.failed)
        num_used = len(batch.labeled) + (len(batch.unlabeled) if batch.unlabeled else 0)
        self.num_drawn += num_used + len(batch.failed)

    def check(self, num_failed: int, num_drawn: int) -> None:
        """
        Stop a training that loses too many images.

        Both numbers are sums over ranks, so that all of them stop together.

        Raises:
            InputError: if more than the allowed share failed, once 100 samples were drawn.
        """
        if num_drawn >= _MIN_DRAWN and num_failed > self._max_share * num_drawn:
            examples = f", from files such as {min(self._files)}" if self._files else ""
            raise InputError(
                f"{num_failed} of {num_drawn} images drawn ({num_failed / num_drawn:.1%}) could "
                f"not be decoded{examples}: repair or remove these files, or raise "
                f"SSOD.DATA.MAX_FAILED_SHARE (now {self._max_share})"
            )


def _collate(samples: list[TrainingSample], num_classes: int) -> TwoStreamBatch:
    labeled = [sample for sample in samples if sample.stream == LABELED]
    unlabeled = [sample for sample in samples if sample.stream != LABELED]
    views = _make_batch(labeled)
    views.targets = _make_targets([(s.boxes, s.classes) for s in labeled], num_classes)
    if views.to_strong is not None:
        moved = [(s.classes, *s.in_strong(s.boxes)) for s in labeled]
        left = [(boxes[rows], classes[rows]) for classes, boxes, rows in moved]
        views.strong_targets = _make_targets(left, num_classes)
    return TwoStreamBatch(
        labeled=views,
        unlabeled=_make_batch(unlabeled) if unlabeled else None,
        failed=[file_name for sample in samples for file_name in sample.failed],
        file_names=[sample.file_name for sample in labeled + unlabeled],
    )


def _make_targets(columns: list[tuple[Tensor, Tensor]], num_classes: int) -> list[Targets]:
    """Make targets of the (M_i, 4) boxes and (M_i,) classes of each image."""
    # All boxes together, like all images below: every tensor storage that a worker sends holds a
    # file descriptor open, and a process may have few.
    boxes, classes = (torch.cat(column) for column in zip(*columns, strict=True))
    targets = Targets.from_ground_truth(boxes, classes, num_classes)
    ends = np.cumsum([len(boxes) for boxes, _ in columns]).tolist()
    return [targets[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _make_batch(samples: list[TrainingSample]) -> Views:
    """Make views without targets."""
    lists = [
        [sample.weak for sample in samples],
        [sample.strong for sample in samples if sample.strong is not None],
        [sample.second_strong for sample in samples if sample.second_strong is not None],
    ]
    views = list(chain(*lists))
    storage = torch.cat([view.flatten() for view in views])
    parts = storage.split([view.numel() for view in views])
    stored = iter([part.view(view.shape) for part, view in zip(parts, views, strict=True)])
    weak, strong, second_strong = (list(islice(stored, len(views))) for views in lists)
    found = Views(weak, strong, None, [sample.image_id for sample in samples], second_strong)
    matrices = [sample.to_strong for sample in samples if sample.to_strong is not None]
    if matrices:  # of all images or of none
        found.to_strong = torch.stack(matrices)
        erased = [sample.erased for sample in samples]
        found.erased = list(torch.cat(erased).split([len(boxes) for boxes in erased]))
    return found


class _BatchDataset(Dataset):
    """
    Makes whole batches; an `InputError` becomes the batch.

    A loader would add the worker's traceback to the error's message, which must stay one line.
    """

    def __init__(self, dataset: Dataset, collate: Callable[[list], Any]):
        self.samples = dataset
        self._collate = collate

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return self._collate([self.samples[key] for key in keys])
        except InputError as error:
            return error


class BatchLoader(DataLoader):
    """
    A `DataLoader` that raises the input errors of its workers as they were, each in one line.

    Iterating draws nothing from the global generator.
    """

    def __init__(self, dataset: Dataset, collate: Callable[[list], Any], **kwargs: Any):
        """Take items, which may raise `InputError`; workers `collate` a list of them to a batch."""
        super().__init__(
            _BatchDataset(dataset, collate),
            collate_fn=_identity,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),
            **kwargs,
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch


def _identity(batch: Any) -> Any:
    return batch


def _without_none(batch: list[Any]) -> list[Any]:
    return [item for item in batch if item is not None]


def _init_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    if photometric.cv2 is not None:
        photometric.cv2.setNumThreads(0)
