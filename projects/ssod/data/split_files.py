"""
Labeled and unlabeled parts of an annotation file, as annotation files.

Their names are those of the tools of MMDetection, SoftTeacher and LabelMatch:
`instances_train2017.1@10.json` and `instances_train2017.1@10-unlabeled.json` are fold 1 of 10 %.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod.data.coco_file import CocoFile, is_crowd, load_coco, load_object
from ssod.data.splits import make_split, make_stratified_split
from ssod.errors import InputError

# What COCO documents of an image. Other sets have fields that tell what is in it, such as LVIS's
# `neg_category_ids`.
_PUBLIC_FIELDS = (
    *("id", "file_name", "width", "height"),
    *("license", "coco_url", "flickr_url", "date_captured"),
)
_TRAIN2017_IMAGES = 117_266  # with boxes; 118,287 with all


@dataclass(frozen=True)
class Split:
    """
    Images of one file in two parts.

    Attributes:
        method: "uniform", "stratified" or "unbiased-teacher".
        percent: of the images, in (0, 100).
        fold: its number, which is the seed of the split.
        labeled: ids of the images that keep their labels.
        unlabeled: ids of those that lose them.
    """

    method: str
    percent: float
    fold: int
    labeled: frozenset[int | str]
    unlabeled: frozenset[int | str]


def read_source(path: str | Path) -> CocoFile:
    """
    Read a file to be split; the images need not be there.

    Raises:
        InputError: if it is not valid COCO, or lists an image file twice, which could then be in
            both parts.
    """
    source = load_coco(path)
    ids: dict[str, int | str] = {}
    for image_id, entry in source.images.items():
        first = ids.setdefault(_file(entry), image_id)
        if first != image_id:
            raise InputError(
                f"{path}: images {first!r} and {image_id!r} are the same file "
                f"{entry['file_name']!r}, which could be in both parts: list it once"
            )
    return source


def split_source(source: CocoFile, percent: float, fold: int, stratified: bool) -> Split:
    """
    Split by `make_split` or `make_stratified_split`, with the number of the fold as the seed.

    `SSOD.DATA.PERCENT` and `SSOD.DATA.SPLIT_SEED` with the same two numbers choose the images of
    a split that is not stratified.

    Raises:
        InputError: if no image is left to be unlabeled.
    """
    if stratified:
        classes_of: dict[int | str, set[int]] = {image_id: set() for image_id in source.images}
        for entry in source.annotations.values():
            if not is_crowd(entry):
                classes_of[entry["image_id"]].add(entry["category_id"])
        labeled = frozenset(make_stratified_split(classes_of, percent, fold))
    else:
        labeled = frozenset(make_split(source.images, percent, fold))
    unlabeled = frozenset(source.images) - labeled
    if not unlabeled:
        raise InputError(
            f"{percent} percent of {len(source.images)} images need all of them, which leaves "
            "none unlabeled: choose fewer percent"
        )
    method = "stratified" if stratified else "uniform"
    return Split(method, percent, fold, labeled, unlabeled)


def read_unbiased_teacher(
    path: str | Path, source: CocoFile, source_path: str | Path, percent: float, fold: int
) -> Split:
    """
    Read a split of Unbiased Teacher's index file, `COCO_supervision.txt`.

    The file gives positions in the list that Detectron2 makes of train2017: images by ascending
    id, without those that have no box but crowds'. The others of this list are unlabeled, as in
    the published code (`divide_label_unlabel` in https://github.com/facebookresearch/
    unbiased-teacher); images that are not in the list are in neither part.

    Args:
        path: of the index file.
        source: the file that positions refer to.
        source_path: its path.
        percent: one of the index file.
        fold: one of the index file, where folds count from 0.

    Raises:
        InputError: if the index file has no such split or is damaged, or if its positions are not
            those of a list as long as that of the source.
    """
    folds = load_object(path, "index file")
    for key in (str(float(percent)), str(fold)):
        if not isinstance(folds, dict) or key not in folds:
            found = ", ".join(map(repr, folds)) if isinstance(folds, dict) else repr(folds)
            wanted = f"entry {key!r} for percent {percent}, fold {fold}"
            raise InputError(f"{path}: has no {wanted}; found {found[:100]}")
        folds = folds[key]
    positions = folds
    if (
        not isinstance(positions, list)
        or not all(type(position) is int and position >= 0 for position in positions)
        or len(set(positions)) != len(positions)
        or not positions
    ):
        raise InputError(
            f"{path}: percent {percent}, fold {fold} must be a list of different positions"
        )
    with_boxes = {entry["image_id"] for entry in source.annotations.values() if not is_crowd(entry)}
    # Detectron2 sorts ids of one type; with both types its loader fails.
    ids = sorted(with_boxes, key=lambda image_id: (isinstance(image_id, str), image_id))
    if "train2017" in Path(source_path).name and len(ids) != _TRAIN2017_IMAGES:
        raise InputError(
            f"{source_path}: {len(ids)} images with boxes, but train2017 has "
            f"{_TRAIN2017_IMAGES}, which the positions count: use COCO's own file"
        )
    # The published code expects this number of positions.
    if max(positions) >= len(ids) or len(positions) != int(percent / 100 * len(ids)):
        raise InputError(
            f"{source_path}: {len(ids)} images with boxes, but {path} has {len(positions)} "
            f"positions up to {max(positions)} as {percent} percent: name the file it was made for"
        )
    labeled = frozenset(ids[position] for position in positions)
    return Split("unbiased-teacher", percent, fold, labeled, frozenset(ids) - labeled)


def select(source: CocoFile, image_ids: Collection[int | str], labels: bool) -> dict[str, Any]:
    """
    Make the content of an annotation file of some of the images, in the order of the source.

    Args:
        source: the file to take them from.
        image_ids: ids in it.
        labels: False leaves out all annotations, and of the images all that COCO does not
            document, so that nothing tells what they show.
    """
    kept = [entry for image_id, entry in source.images.items() if image_id in image_ids]
    if labels:
        annotations = [
            entry for entry in source.annotations.values() if entry["image_id"] in image_ids
        ]
    else:
        annotations = []
        kept = [{key: entry[key] for key in _PUBLIC_FIELDS if key in entry} for entry in kept]
    parts = {"images": kept, "annotations": annotations}
    shared = ("info", "licenses", "categories")
    return {key: source.content[key] for key in shared if key in source.content} | parts


def hash_ids(image_ids: Iterable[int | str]) -> str:
    """
    SHA-256 of the ids, sorted as text and joined by newlines; 1 and "1" are the same.

    The order of the ids does not matter: two files have the same images if it is the same.
    """
    text = "\n".join(sorted(map(str, image_ids)))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def count_boxes(annotations: Iterable[dict[str, Any]], names: dict[int, str]) -> dict[str, int]:
    """Count the boxes of each class that has any, crowds left out, in the order of `names`."""
    counts = Counter(entry["category_id"] for entry in annotations if not is_crowd(entry))
    boxes: Counter[str] = Counter()  # two categories may have one name
    for category_id, name in names.items():
        boxes[name] += counts[category_id]
    return {name: number for name, number in boxes.items() if number}


def find_unknown(part: CocoFile, source: CocoFile) -> list[int | str]:
    """Return the ids of images that another file does not list with this id and file name."""
    return [
        image_id
        for image_id, entry in part.images.items()
        if image_id not in source.images or _file(source.images[image_id]) != _file(entry)
    ]


def check_pair(labeled: CocoFile, unlabeled: CocoFile) -> None:
    """
    Make sure that no image is in both parts of a split, neither by its id nor by its file name.

    Folders count: `a/1.jpg` and `b/1.jpg` are different files.

    Raises:
        InputError: with the number of such images and an example.
    """
    shared = labeled.images.keys() & unlabeled.images.keys()
    if shared:
        raise InputError(
            f"leak: {len(shared)} of {len(labeled.images)} labeled images are unlabeled as well, "
            f"among them id {min(shared, key=str)!r}: remove them from one of the two files"
        )
    files = {_file(entry): image_id for image_id, entry in labeled.images.items()}
    pairs = [
        (file, files[file], image_id)
        for image_id, entry in unlabeled.images.items()
        if (file := _file(entry)) in files
    ]
    if pairs:
        file, one, other = pairs[0]
        raise InputError(
            f"leak: {len(pairs)} of {len(labeled.images)} labeled images are unlabeled under "
            f"another id, among them {file!r} with the ids {one!r} and {other!r}: remove one"
        )


def _file(entry: dict[str, Any]) -> str:
    return posixpath.normpath(entry["file_name"])
