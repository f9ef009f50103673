"""
Looks at all data of a run before it is trained on, and collects what is wrong with them.

Every image file is read once, for its pixels and for the hash of its bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from ssod.data.images import read_image
from ssod.data.reading import HARMLESS, MISSING_FILES, UNREADABLE
from ssod.data.records import DetectionDataset, FlatList
from ssod.errors import InputError

_FILES_PER_BATCH = 32  # that a process reads and reports at once
_BROKEN = "images that cannot be read"
Row = dict[str, str | int]


class Findings:
    """
    Problems by their kind, each a line that names file and entry.

    Attributes:
        errors: what is wrong, `{kind: messages}`.
        warnings: what may be as it should.
    """

    def __init__(self) -> None:
        self.errors: dict[str, list[str]] = defaultdict(list)
        self.warnings: dict[str, list[str]] = defaultdict(list)

    def collect(self, kind: str, error: InputError) -> None:
        """Take a problem of a reader; this method is an `OnProblem`."""
        # Files are all opened afterwards, and those that are missing are named one by one then.
        if kind != MISSING_FILES:
            is_warning = kind in HARMLESS and kind != UNREADABLE
            (self.warnings if is_warning else self.errors)[kind].append(str(error))


@dataclass(frozen=True)
class FileFacts:
    """
    What is known of an image file.

    Attributes:
        size: (height, width) of the upright image, None if it cannot be decoded.
        digest: SHA-256 of the bytes, None if they cannot be read.
        problem: kind and message, None for a file that is as it should be.
    """

    size: tuple[int, int] | None
    digest: bytes | None
    problem: tuple[str, str] | None = None


def read_facts(file_name: str) -> FileFacts:
    """Read, hash and decode a file; never raises for what is wrong with it."""
    try:
        content = Path(file_name).read_bytes()
    except FileNotFoundError:
        return FileFacts(None, None, (MISSING_FILES, f"{file_name}: not found"))
    except (OSError, ValueError) as error:  # ValueError: characters that no path can have
        return FileFacts(None, None, (_BROKEN, f"{file_name}: cannot be read ({error})"))
    digest = hashlib.sha256(content).digest()
    if not content:
        return FileFacts(None, digest, (_BROKEN, f"{file_name}: is empty, it has 0 bytes"))
    try:
        height, width, _ = read_image(file_name, content).shape
    except InputError as error:
        return FileFacts(None, digest, (_BROKEN, str(error)))
    return FileFacts((height, width), digest)


def _read_batch(names: list[str]) -> list[tuple[str, FileFacts]]:
    return [(name, read_facts(name)) for name in names]


def scan_files(
    file_names: Iterable[str], num_workers: int, progress: Callable[[int], None]
) -> dict[str, FileFacts]:
    """
    Read all files, in parallel.

    Args:
        file_names: repeated ones are read once.
        num_workers: processes, 0 to read them in this one; at most one a processor.
        progress: is called with the number of files that have been read since the last call.
    """
    facts: dict[str, FileFacts] = {}
    loader = DataLoader(
        FlatList(dict.fromkeys(file_names)),  # which workers share
        batch_size=_FILES_PER_BATCH,
        collate_fn=_read_batch,  # in the workers
        num_workers=min(num_workers, os.cpu_count() or 1),
    )
    for batch in loader:
        facts.update(batch)
        progress(len(batch))
    return facts


def check_files(
    name: str, dataset: DetectionDataset, facts: Mapping[str, FileFacts], findings: Findings
) -> None:
    """Add the problems of a set's files, and sizes other than in its annotations, to `findings`."""
    for record in dataset:
        found = facts[record.file_name]
        where = f"{name}, image {record.image_id!r}"
        if found.problem is not None:
            kind, message = found.problem
            findings.errors[kind].append(f"{where}: {message}")
        elif found.size != (record.height, record.width):
            height, width = found.size
            swapped = (width, height) == (record.height, record.width)
            hint = "; turn the boxes as well, the image is stored on its side" if swapped else ""
            findings.errors["sizes"].append(
                f"{where}: the annotations say {record.width} x {record.height}, but "
                f"{record.file_name}, upright by its Exif orientation, has {width} x {height}{hint}"
            )


def check_overlap(
    sets: Mapping[str, DetectionDataset], facts: Mapping[str, FileFacts], findings: Findings
) -> None:
    """
    Add images, equal byte for byte, that are in two sets or twice in one, to `findings`.

    One of the labeled set that is in another is an error, the rest are warnings.
    """
    first: dict[bytes, tuple[str, str]] = {}
    for name, dataset in sets.items():
        for file_name in dataset.file_names:
            digest = facts[file_name].digest
            if digest is None or facts[file_name].size is None:
                continue
            if digest not in first:
                first[digest] = name, file_name
                continue
            other, other_file = first[digest]
            what = f"has the content of {other_file}" if file_name != other_file else "is"
            if other == name:
                what = "is listed twice" if what == "is" else what
                findings.warnings["images twice in a set"].append(f"{file_name} ({name}) {what}")
                continue
            # A teacher labels the images that it is measured on: a run does not mind.
            problems = findings.errors if "labeled" in (name, other) else findings.warnings
            where = f"({other})" if what != "is" else f"{other} as well"
            problems["images in two sets"].append(
                f"{file_name} ({name}) {what} {where}: remove it from one of the two"
            )


def check_classes(name: str, dataset: DetectionDataset, findings: Findings) -> None:
    """Collect the classes of a set that have no box, as warnings."""
    for label in np.flatnonzero(dataset.class_counts == 0):
        class_name = dataset.class_names[label]
        findings.warnings["classes without boxes"].append(f"{name}: {class_name!r} has no box")


def describe_sets(
    sets: Mapping[str, DetectionDataset], labeled: Sequence[str]
) -> tuple[list[Row], list[Row]]:
    """
    Count images, boxes and sizes of sets, of which those named in `labeled` have boxes.

    Returns:
        A row a set, and a row a class with the boxes of the sets that have any.
    """
    rows: list[Row] = []
    for name, dataset in sets.items():
        row: Row = {"set": name, "images": len(dataset)}
        if name in labeled:
            counts = dataset.box_counts
            row |= {"boxes": int(counts.sum()), "without boxes": int((counts == 0).sum())}
            row["boxes an image"] = _spread(counts)
        row["width"], row["height"] = _spread(dataset.sizes[:, 1]), _spread(dataset.sizes[:, 0])
        rows.append(row)
    counts_of = {name: sets[name] for name in labeled if name in sets}
    names = dict.fromkeys(name for dataset in counts_of.values() for name in dataset.class_names)
    classes: list[Row] = [{"class": name} for name in names]
    for set_name, dataset in counts_of.items():
        found = dict(zip(dataset.class_names, dataset.class_counts.tolist(), strict=True))
        for row in classes:
            row[set_name] = found.get(row["class"], 0)
    return rows, classes


def _spread(values: np.ndarray) -> str:
    """Minimum, median and maximum; "-" for nothing."""
    if not len(values):
        return "-"
    return f"{values.min()} / {np.median(values):g} / {values.max()}"
