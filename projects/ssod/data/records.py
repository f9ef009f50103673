"""
Images with their boxes, and sets of them.

Shape shorthand: N images, M boxes of one image, K foreground classes.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ssod.errors import InputError

_UTF_8 = ("utf-8", "surrogatepass")  # file names may have what is not text


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

    @classmethod
    def from_rows(
        cls,
        image_id: int | str,
        file_name: str,
        size: tuple[int, int],
        boxes: Sequence[np.ndarray] = (),
        classes: Sequence[int] = (),
    ) -> ImageRecord:
        """Make a record of height and width, and M boxes, each (4,), with their classes."""
        rows = np.array(boxes, np.float32).reshape(-1, 4)
        return cls(image_id, file_name, *size, rows, np.array(classes, np.int64))


class FlatList(Sequence[int | str]):
    """
    A list of strings and integers, kept as text in one buffer and made anew when read.

    As objects, a million of them would be copied into every process that reads them: reading an
    object changes its reference count, and with it the memory page that was shared.
    """

    def __init__(self, items: Iterable[int | str] = ()):
        self._text = bytearray()
        self._ends = array("q", [0])
        self._is_int = bytearray()
        for item in items:
            self.append(item)

    def append(self, item: int | str) -> None:
        """Add an item at the end."""
        self._text += str(item).encode(*_UTF_8)
        self._ends.append(len(self._text))
        self._is_int.append(not isinstance(item, str))

    def select(self, keep: np.ndarray) -> FlatList:
        """Return the items where `keep`, (N,) bool, is True."""
        lengths = np.diff(self._ends)
        selected = FlatList()
        selected._text += np.frombuffer(self._text, np.uint8)[np.repeat(keep, lengths)].tobytes()
        selected._ends.frombytes(np.cumsum(lengths[keep]).tobytes())
        selected._is_int += np.frombuffer(self._is_int, np.uint8)[keep].tobytes()
        return selected

    def __len__(self) -> int:
        return len(self._is_int)

    def __getitem__(self, index: int | slice) -> int | str | list[int | str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]  # counts from the end if negative; IndexError beyond it
        text = self._text[self._ends[i] : self._ends[i + 1]].decode(*_UTF_8)
        return int(text) if self._is_int[i] else text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (FlatList, list)):
            return NotImplemented
        return list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


class DetectionDataset:
    """
    A sequence of `ImageRecord`, read by index or one after the other.

    All is kept in a few flat arrays, which processes that are forked share, and which are filled
    record by record: a million images without boxes take about 0.2 GB.

    Attributes:
        class_names: K names.
        category_ids: K ids that the classes have in the annotation file.
        image_ids: N ids.
        file_names: N absolute paths.
        sizes: (N, 2) int32 height and width in pixels.
        box_counts: (N,) int32 boxes of each image.
        aspect_ratios: (N,) float32 width / height.
        class_counts: (K,) int64 boxes of each class.
    """

    def __init__(
        self,
        records: Iterable[ImageRecord],
        class_names: Sequence[str],
        category_ids: Sequence[int],
    ):
        self.class_names = list(class_names)
        self.category_ids = list(category_ids)
        self.image_ids = FlatList()
        self.file_names = FlatList()
        sizes, counts, boxes, classes = array("i"), array("i"), array("f"), array("q")
        for record in records:
            self.image_ids.append(record.image_id)
            self.file_names.append(record.file_name)
            sizes.extend((record.height, record.width))
            counts.append(len(record.boxes))
            if len(record.boxes):
                boxes.frombytes(np.asarray(record.boxes, np.float32).tobytes())
                classes.frombytes(np.asarray(record.classes, np.int64).tobytes())
        # As they are, not copied.
        self.sizes = np.frombuffer(sizes, np.int32).reshape(-1, 2)
        self._set_boxes(
            np.frombuffer(boxes, np.float32).reshape(-1, 4),
            np.frombuffer(classes, np.int64),
            np.frombuffer(counts, np.int32),
        )
        self.aspect_ratios = (self.sizes[:, 1] / self.sizes[:, 0]).astype(np.float32)

    def _set_boxes(self, boxes: np.ndarray, classes: np.ndarray, counts: np.ndarray) -> None:
        self._boxes, self._classes, self.box_counts = boxes, classes, counts
        self._starts = np.cumsum(counts) - counts
        self.class_counts = np.bincount(classes, minlength=self.num_classes)

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
        rows = slice(self._starts[index], self._starts[index] + self.box_counts[index])
        height, width = self.sizes[index].tolist()
        return ImageRecord(
            self.image_ids[index],
            self.file_names[index],
            height,
            width,
            self._boxes[rows],
            self._classes[rows],
        )

    def without_boxes(self) -> DetectionDataset:
        """Return the same images with M = 0 boxes each."""
        bare = copy.copy(self)
        no_boxes, no_classes = np.empty((0, 4), np.float32), np.empty(0, np.int64)
        bare._set_boxes(no_boxes, no_classes, np.zeros(len(self), np.int32))
        return bare

    def select(self, image_ids: Iterable[int | str]) -> DetectionDataset:
        """
        Return the images with these ids, in the order of this set.

        Raises:
            InputError: if an id is not in the set.
        """
        wanted = set(image_ids)
        keep = np.fromiter((i in wanted for i in self.image_ids), bool, len(self))
        selected = copy.copy(self)
        selected.image_ids = self.image_ids.select(keep)
        unknown = wanted.difference(selected.image_ids)
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(wanted)} selected image ids are not in the set of "
                f"{len(self)} images, among them {min(unknown, key=str)!r}: was the split made for "
                "another annotation file?"
            )
        selected.file_names = self.file_names.select(keep)
        selected.sizes = self.sizes[keep]
        selected.aspect_ratios = self.aspect_ratios[keep]
        rows = np.repeat(keep, self.box_counts)
        selected._set_boxes(self._boxes[rows], self._classes[rows], self.box_counts[keep])
        return selected
