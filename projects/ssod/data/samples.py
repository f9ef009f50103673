"""
From an entry of a set to the tensors of one image, in training and in evaluation.

What a training sample looks like depends on the seed and on its place in its stream only, so
neither the number of workers nor the iteration a run was resumed at makes a difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssod.core.geometry import transfer_boxes
from ssod.data.images import read_image
from ssod.data.records import DetectionDataset, ImageRecord
from ssod.data.sampler import LABELED, SampleKey
from ssod.data.views import make_test_view, make_views, strong_view
from ssod.errors import InputError

_MAX_TRIES = 5  # images tried in the place of one
# Last words of the seeds that replacements and second strong views are drawn with, so that other
# draws are what they were; see the sampler.
_REPLACEMENT, _SECOND_STRONG = 3, 4


@dataclass
class TrainingSample:
    """
    One image in its views.

    Attributes:
        stream: LABELED or UNLABELED.
        weak: (3, h, w) uint8.
        strong: the same shape, unless there is `to_strong`; None for a labeled image of which only
            the weak view is learned.
        boxes: (M, 4) float32 pixels of the weak view.
        classes: (M,) int64.
        image_id: of the image used.
        file_name: the same.
        failed: files that could not be decoded before one could.
        second_strong: of the weak view's pixels, drawn independently; None unless it is wanted.
        to_strong: (3, 3) float64 from pixels of the weak to those of the strong view; None if they
            are the same.
        erased: (E, 4) float32 rectangles of the strong view; empty if `to_strong` is None.
    """

    stream: int
    weak: Tensor
    strong: Tensor | None
    boxes: Tensor
    classes: Tensor
    image_id: int | str
    file_name: str
    failed: list[str]
    second_strong: Tensor | None = None
    to_strong: Tensor | None = None
    erased: Tensor = field(default_factory=lambda: torch.empty(0, 4))

    def in_strong(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return (M, 4) boxes of the weak view in the strong one, and (M,) which are left there."""
        if self.to_strong is None or self.strong is None:
            return boxes, torch.ones(len(boxes), dtype=torch.bool)
        height, width = self.strong.shape[1:]
        return transfer_boxes(boxes, self.to_strong, (height, width), self.erased)


class TwoStreamDataset(Dataset):
    """
    Maps the keys of `TwoStreamSampler` to training samples.

    A file that cannot be decoded is replaced by another image of its set, drawn from the key. With
    `second_strong` unlabeled images have a second strong view. For `view_args` see `make_views`.
    """

    def __init__(
        self,
        labeled: DetectionDataset,
        unlabeled: DetectionDataset | None,
        *,
        seed: int,
        labeled_strong: bool,
        second_strong: bool = False,
        **view_args: Any,
    ):
        self._labeled_strong = labeled_strong
        self._second_strong = second_strong
        self._datasets = (labeled, unlabeled)
        self._seed = seed
        self._view_args = view_args

    def __getitem__(self, key: SampleKey) -> TrainingSample:
        """
        Decode an image and make its views.

        Raises:
            InputError: if several images in a row cannot be decoded, or a labeled image has not
                the size that its boxes were made for.
        """
        stream, n, index = key
        dataset = self._datasets[stream]
        failed: list[str] = []
        replacement = np.random.default_rng((self._seed, stream, n, _REPLACEMENT))
        while True:
            record = dataset[index]
            try:
                image = read_image(record.file_name)
                break
            except InputError as error:
                failed.append(record.file_name)
                if len(failed) == _MAX_TRIES:
                    raise InputError(f"{_MAX_TRIES} images in a row failed: {error}") from error
                step = 1 + int(replacement.integers(max(1, len(dataset) - 1)))
                index = (index + step) % len(dataset)  # never the same one again
        if stream == LABELED:
            _check_size(record, image)
        rng = np.random.default_rng((self._seed, stream, n))
        views = make_views(
            image,
            record.boxes,
            rng=rng,
            with_strong=stream != LABELED or self._labeled_strong,
            **self._view_args,
        )
        second = None
        if stream != LABELED and self._second_strong:
            rng = np.random.default_rng((self._seed, stream, n, _SECOND_STRONG))
            second = strong_view(views.weak, rng)
        return TrainingSample(
            stream,
            views.weak,
            views.strong,
            views.boxes,
            torch.from_numpy(record.classes),
            record.image_id,
            record.file_name,
            failed,
            second,
            views.to_strong,
            views.erased,
        )


@dataclass
class EvaluationItem:
    """
    One image to evaluate.

    Attributes:
        image: (3, h, w) uint8, resized.
        matrix: (3, 3) float64, from pixels of the original to pixels of `image`.
        index: of the record in its dataset.
    """

    image: Tensor
    matrix: Tensor
    index: int


class EvaluationDataset(Dataset):
    """Maps the index of a record to its `EvaluationItem`."""

    def __init__(
        self, dataset: DetectionDataset, min_size: int, max_size: int, skip_broken: bool = False
    ):
        self._dataset = dataset
        self._sizes = (min_size, max_size)
        self._skip_broken = skip_broken

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> EvaluationItem | None:
        record = self._dataset[index]
        try:
            image = read_image(record.file_name)
            if not self._skip_broken:
                _check_size(record, image)
        except InputError:
            if self._skip_broken:
                return None
            raise
        return EvaluationItem(*make_test_view(image, *self._sizes), index)


def _check_size(record: ImageRecord, image: np.ndarray) -> None:
    if image.shape[:2] != (record.height, record.width):
        raise InputError(
            f"{record.file_name}: the annotations say height {record.height} and width "
            f"{record.width}, but the image, upright by its Exif orientation, has "
            f"{image.shape[0]} and {image.shape[1]}: correct the annotation file"
        )
