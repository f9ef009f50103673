"""
Images with their boxes, and sets of them.

Shape shorthand: M boxes of one image, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ssod.errors import InputError


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """
    One image of a set and its boxes.

    Attributes:
        image_id: unique in the set.
        file_name: absolute path.
        height: pixels of the upright image.
        width: the same.
        boxes: (M, 4) float32 XYXY pixels, M = 0 for images without boxes or without labels.
        classes: (M,) int64 in [0, K).
    """

    image_id: int | str
    file_name: str
    height: int
    width: int
    boxes: np.ndarray
    classes: np.ndarray


class DetectionDataset:
    """
    A sequence of `ImageRecord`, read by index.

    Numbers are kept in a few flat arrays, because every Python object that a loading process
    touches is copied into its memory, and there may be millions of boxes.

    Attributes:
        class_names: K names.
        category_ids: K ids that the classes have in the annotation file.
        image_ids: one an image.
        file_names: one an image.
        aspect_ratios: float32 width / height, one an image.
        class_counts: (K,) int64 boxes of each class.
    """

    def __init__(
        self,
        records: Iterable[ImageRecord],
        class_names: Sequence[str],
        category_ids: Sequence[int],
    ):
        records = list(records)
        self.class_names = list(class_names)
        self.category_ids = list(category_ids)
        self.image_ids = [r.image_id for r in records]
        self.file_names = [r.file_name for r in records]
        self._sizes = np.array([(r.height, r.width) for r in records], np.int64).reshape(-1, 2)
        self._boxes = np.concatenate([np.empty((0, 4), np.float32), *(r.boxes for r in records)])
        self._classes = np.concatenate([np.empty(0, np.int64), *(r.classes for r in records)])
        self._counts = np.array([len(r.boxes) for r in records], np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self.aspect_ratios = (self._sizes[:, 1] / self._sizes[:, 0]).astype(np.float32)
        self.class_counts = np.bincount(self._classes, minlength=self.num_classes)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def categories(self) -> list[dict[str, int | str]]:
        """The classes as COCO's `categories`, in their order."""
        pairs = zip(self.category_ids, self.class_names, strict=True)
        return [{"id": int(number), "name": str(name)} for number, name in pairs]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> ImageRecord:
        rows = slice(self._starts[index], self._starts[index] + self._counts[index])
        height, width = self._sizes[index].tolist()
        return ImageRecord(
            self.image_ids[index],
            self.file_names[index],
            height,
            width,
            self._boxes[rows],
            self._classes[rows],
        )

    def select(self, image_ids: Iterable[int | str]) -> DetectionDataset:
        """
        Return the images with these ids, in the order of this set.

        Raises:
            InputError: if an id is not in the set.
        """
        wanted = set(image_ids)
        unknown = wanted.difference(self.image_ids)
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(wanted)} selected image ids are not in the set of "
                f"{len(self)} images, among them {min(unknown, key=str)!r}: was the split made for "
                "another annotation file?"
            )
        chosen = (self[i] for i, image_id in enumerate(self.image_ids) if image_id in wanted)
        return DetectionDataset(chosen, self.class_names, self.category_ids)
