"""
A list of the images of a folder with their sizes, in a text file that takes seconds to read.

The first line is `ssod-index 1`, the number of images and their folder, separated by tabs. Each of
the others is an image: its path relative to the folder, with forward slashes, its height and its
width in pixels, sorted by path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from ssod.data.records import DetectionDataset, ImageRecord
from ssod.errors import InputError

_HEADER = re.compile(r"ssod-index 1\t([0-9]{1,12})\t(.+)\n")
_IMAGE = re.compile(r"([^\t]+)\t([1-9][0-9]{0,5})\t([1-9][0-9]{0,5})\n")
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
_LOOKED_FOR = 1000  # files, to find out whether the index is of this folder


def can_be_listed(name: str) -> bool:
    """Tell whether a path can stand in an index: tabs and newlines cannot."""
    return "\t" not in name and "\n" not in name


def write_index(path: str | Path, folder: str, images: Iterable[tuple[str, int, int]]) -> None:
    """
    Write an index.

    Args:
        path: the file to write.
        folder: absolute path.
        images: (relative path, height, width) of each image, every path once.

    Raises:
        ValueError: if `can_be_listed` is False for a path.
    """
    images = sorted(images)
    for name in (folder, *(image[0] for image in images)):
        if not can_be_listed(name):
            raise ValueError(f"{name!r}: a path with a tab or a newline cannot stand in an index")
    with open(path, "w", **_TEXT) as file:
        file.write(f"ssod-index 1\t{len(images)}\t{folder}\n")
        file.writelines(f"{name}\t{height}\t{width}\n" for name, height, width in images)


def read_index(
    path: str | Path,
    image_root: str | Path,
    class_names: Sequence[str],
    category_ids: Sequence[int],
) -> DetectionDataset:
    """
    Make an unlabeled set of the images that an index lists, without opening them.

    The id of an image is its path in the index. About a thousand files, spread evenly, are looked
    for; others may be missing, as a file that is not there counts as one that cannot be decoded.

    Args:
        path: the index.
        image_root: folder of the images; "" for the one they were in when the index was made.
        class_names: K names, those of the labeled set.
        category_ids: K ids, those of the labeled set.

    Raises:
        InputError: if the index is missing, damaged or cut short, lists no image, or a file that
            was looked for is missing.
    """
    try:
        with open(path, **_TEXT) as file:
            header = _HEADER.fullmatch(file.readline())
            if header is None:
                raise InputError(f"{path}: line 1: expected a file that `ssod index` has written")
            root = os.path.abspath(image_root or header[2])
            dataset = DetectionDataset(_read_images(path, file, root), class_names, category_ids)
    except OSError as error:
        raise InputError(
            f"{path}: index cannot be read ({error.strerror}); `ssod index` makes one"
        ) from error
    if len(dataset) != int(header[1]) or not len(dataset):
        raise InputError(
            f"{path}: expected the {int(header[1])} images that line 1 speaks of, at least one, "
            f"found {len(dataset)}: make the index again"
        )
    looked_for = dataset.file_names[:: max(1, len(dataset) // _LOOKED_FOR)]
    missing = [name for name in looked_for if not os.path.isfile(name)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(looked_for)} image files looked for are missing, such "
            f"as {missing[0]!r}: set SSOD.DATA.UNLABELED_IMAGES to their folder, or index it again"
        )
    return dataset


def _read_images(path: str | Path, lines: TextIO, root: str) -> Iterator[ImageRecord]:
    prefix, previous = os.path.join(root, ""), ""
    no_boxes, no_classes = np.empty((0, 4), np.float32), np.empty(0, np.int64)
    for number, line in enumerate(lines, 2):
        image = _IMAGE.fullmatch(line)
        if image is None:
            raise InputError(
                f"{path}: line {number}: expected a path, a height and a width in pixels, "
                f"separated by tabs, found {line[:200]!r}: make the index again"
            )
        name, height, width = image.groups()
        if name <= previous:
            raise InputError(
                f"{path}: line {number}: expected paths in ascending order, each once, found "
                f"{name!r} after {previous!r}: make the index again"
            )
        previous = name
        yield ImageRecord(name, prefix + name, int(height), int(width), no_boxes, no_classes)
