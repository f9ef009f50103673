"""Sets of images to train on and to test with: the names other packages import."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from ssod.data.coco import read_coco
from ssod.data.images import IMAGE_SUFFIXES, read_image_size
from ssod.data.index import read_index
from ssod.data.reading import UNREADABLE, OnProblem, stop
from ssod.data.records import DetectionDataset, ImageRecord
from ssod.data.voc import read_voc
from ssod.errors import InputError

__all__ = [
    "DetectionDataset",
    "ImageRecord",
    "check_disjoint",
    "find_images",
    "read_coco",
    "read_image_folder",
    "read_images",
    "read_index",
    "read_sizes",
    "read_voc",
]

logger = logging.getLogger(__name__)

_KNOWN = ", ".join(sorted(IMAGE_SUFFIXES))
_THREADS = 16


def read_image_folder(
    path: str | Path,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    on_problem: OnProblem = stop,
) -> DetectionDataset:
    """
    Make an unlabeled set of all images below a folder; no annotation file is needed.

    Files are found by their suffix (jpg, jpeg, png, webp, bmp, tif, tiff in any case) in all
    subfolders and sorted; hidden files and folders are skipped. The id of an image is its path
    relative to the folder, with forward slashes. Files with unreadable headers are left out with
    one warning, and `on_problem` is told of each. Names and ids of the K classes are those of the
    labeled set.

    Raises:
        InputError: if the folder is missing or has no readable image.
    """
    if not os.path.isdir(path):
        raise InputError(f"{path}: image folder not found")
    dataset, failures = read_images([path], class_names, category_ids)
    for failure in failures:
        on_problem(UNREADABLE, failure)
    if failures:
        logger.warning("Left out %d unreadable images, the first: %s", len(failures), failures[0])
    return dataset


def read_images(
    paths: Sequence[str | Path], class_names: Sequence[str], category_ids: Sequence[int]
) -> tuple[DetectionDataset, list[InputError]]:
    """
    Make a set without boxes of image files and of all images below folders.

    Paths keep their order; what is in a folder is found as by `read_image_folder`, and a file that
    is named twice is read once. The id of an image is its path, with forward slashes, relative to
    the deepest folder that all of them are in. There are K class names and category ids.

    Returns:
        The set, and an error for each file whose header cannot be read, which is left out.

    Raises:
        InputError: for a path that is neither, and if no image is readable.
    """
    folders, files = [], []
    for path in paths:
        full = os.path.abspath(path)
        if os.path.isdir(full):
            folders.append(full)
            files += [os.path.join(full, name) for name in find_images(full)]
        elif os.path.isfile(full) and _has_image_suffix(full):
            folders.append(os.path.dirname(full))
            files.append(full)
        else:
            problem = "it is another file" if os.path.isfile(full) else "there is none"
            raise InputError(f"{path}: expected a folder or an image ({_KNOWN}), but {problem}")
    root = os.path.join(os.path.commonpath(folders), "")
    names = [name[len(root) :] for name in dict.fromkeys(files)]
    failures: list[InputError] = []
    dataset = DetectionDataset(_read_records(root, names, failures), class_names, category_ids)
    if not len(dataset):
        found = f"none of its {len(failures)} images is readable" if failures else "it has none"
        where = paths[0] if len(paths) == 1 else root
        raise InputError(f"{where}: expected a folder with images ({_KNOWN}), but {found}")
    return dataset, failures


def _read_records(
    root: str, names: Sequence[str], failures: list[InputError]
) -> Iterator[ImageRecord]:
    for name, size in zip(names, read_sizes(root, names), strict=True):
        if isinstance(size, InputError):
            failures.append(size)
        else:
            image_id = name.replace(os.sep, "/")
            yield ImageRecord.from_rows(image_id, os.path.join(root, name), size)


def _has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def find_images(root: str) -> list[str]:
    """
    Return the sorted paths of the images below a folder, relative to it and with forward slashes.

    For what is found see `read_image_folder`.

    Raises:
        InputError: if the folder is missing.
    """
    if not os.path.isdir(root):
        raise InputError(f"{root}: image folder not found")
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = "" if folder == root else Path(folder).relative_to(root).as_posix() + "/"
        for name in names:
            if not name.startswith(".") and _has_image_suffix(name):
                found.append(prefix + name)
    return sorted(found)


def read_sizes(root: str, names: Sequence[str]) -> Iterator[tuple[int, int] | InputError]:
    """
    Read the size of each image: (height, width) in pixels, or why there is none.

    The names are paths relative to the folder `root`.
    """
    # Threads, as headers are small and disks far away: the time is spent waiting.
    with ThreadPool(_THREADS) as pool:
        files = (os.path.join(root, name) for name in names)
        yield from pool.imap(_try_read_size, files, chunksize=64)


def _try_read_size(path: str) -> tuple[int, int] | InputError:
    try:
        return read_image_size(path)
    except InputError as error:
        return error


def check_disjoint(
    labeled: DetectionDataset, other: DetectionDataset, other_name: str = "unlabeled"
) -> None:
    """
    Make sure that no image file, links resolved, is in both sets.

    Raises:
        InputError: naming an example. Labels of such an image would leak into the other set.
    """
    shared = set(_real_files(labeled)).intersection(_real_files(other))
    if shared:
        raise InputError(
            f"{len(shared)} image files are both labeled and {other_name}, among them "
            f"{min(shared)}: remove them from one of the two sets"
        )


def _real_files(dataset: DetectionDataset) -> Iterator[str]:
    # Folders are resolved and listed once: resolving every path takes many times as long, and
    # asking for every file whether it is a link takes minutes on a network disk.
    folders: dict[str, tuple[str, set[str]]] = {}
    for file_name in dataset.file_names:
        folder, name = os.path.split(file_name)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder), _find_links(folder)
        real_folder, links = folders[folder]
        yield os.path.realpath(file_name) if name in links else os.path.join(real_folder, name)


def _find_links(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except (OSError, ValueError):  # as in `read_coco`: such files are reported when they are read
        return set()
