"""`ssod split`: labeled and unlabeled parts of a set as files."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ssod.data.coco_file import CocoFile, load_coco, load_object
from ssod.data.split_files import (
    Split,
    check_pair,
    count_boxes,
    find_unknown,
    hash_ids,
    read_source,
    read_unbiased_teacher,
    select,
    split_source,
)
from ssod.errors import InputError
from ssod.evaluation.report import format_table
from ssod.files import replacing

_EPILOG = """\
Each percent and fold gives two files, named as the tools of MMDetection and SoftTeacher do:
  instances_train2017.1@10.json            the labeled images with their annotations
  instances_train2017.1@10-unlabeled.json  the other images, without any annotation
instances_train2017.splits.json lists them with their seeds, numbers of images and boxes, and a hash
of their image ids that does not depend on their order. Images need not be on this machine.

A split is chosen by the ids of the images: SSOD.DATA.PERCENT 10 SSOD.DATA.SPLIT_SEED 1 in a config
chooses the images of fold 1, and a smaller percent of one fold is contained in a larger one."""


@dataclass(frozen=True)
class _File:
    """One file to be written: the images with these ids, with their labels or without."""

    path: Path
    split: Split
    image_ids: frozenset[int | str]
    labels: bool


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the `ssod` program."""
    parser = commands.add_parser(
        "split",
        help="write labeled and unlabeled parts of a COCO file, or check those of others",
        description="Split an annotation file into a labeled and an unlabeled part.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="JSON", nargs="?", help="COCO annotation file to split")
    parser.add_argument(
        "--percent",
        type=_percent,
        nargs="+",
        metavar="P",
        help="percent of the images that keep their labels, one or more",
    )
    folds = parser.add_mutually_exclusive_group()
    folds.add_argument(
        "--folds",
        type=partial(_number, least=1),
        default=1,
        metavar="N",
        help="write the folds 1 to N; fold F is the split of seed F (default: %(default)s)",
    )
    folds.add_argument(
        "--fold", type=partial(_number, least=0), metavar="F", help="write this fold only"
    )
    method = parser.add_mutually_exclusive_group()
    method.add_argument(
        "--stratified",
        action="store_true",
        help="every class keeps its share of images, at least one; smaller splits are not "
        "contained in larger ones",
    )
    method.add_argument(
        "--unbiased-teacher",
        metavar="FILE",
        help="take the images from Unbiased Teacher's COCO_supervision.txt, whose folds are 0 to "
        "9; images without boxes are in neither part",
    )
    parser.add_argument(
        "--truth",
        action="store_true",
        help="write ...-unlabeled-truth.json as well, the unlabeled images with their annotations, "
        "to measure pseudo-labels against (SSOD.DATA.UNLABELED_TRUTH_JSON)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write into (default: that of JSON)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that are there and differ"
    )
    parser.add_argument(
        "--check",
        nargs=2,
        metavar=("LABELED", "UNLABELED"),
        help="write nothing; check that no image of these two files is in both and, with JSON, "
        "that all are from there, and count their boxes",
    )
    parser.set_defaults(command=run)


def _percent(text: str) -> float:
    try:
        percent = float(text)
    except ValueError:
        percent = math.nan
    if not 0 < percent < 100:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 100), got {text!r}")
    return percent


def _number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a number from {least}, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Write the splits, or check one."""
    if bool(args.check) == bool(args.percent) or not (args.check or args.source):
        raise InputError(
            "name an annotation file and --percent to split it, or --check and two files"
        )
    if args.check:
        if args.truth or args.output or args.overwrite or args.stratified or args.unbiased_teacher:
            raise InputError("--check writes nothing: leave out all options but the files")
        _check(*args.check, args.source)
        return
    path = Path(args.source)
    source = read_source(path)
    output = Path(args.output) if args.output else path.parent
    files = list(_files(args, path, source, output))
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write_files(path, source, files, output, args.overwrite)
    except OSError as error:
        where = error.filename or output
        raise InputError(f"{where}: cannot be written ({error.strerror})") from error


def _files(args: argparse.Namespace, path: Path, source: CocoFile, output: Path) -> Iterator[_File]:
    """Choose the images of each file that is asked for."""
    folds = range(1, args.folds + 1) if args.fold is None else [args.fold]
    for percent in dict.fromkeys(args.percent):
        for fold in folds:
            if args.unbiased_teacher:
                split = read_unbiased_teacher(args.unbiased_teacher, source, path, percent, fold)
            else:
                split = split_source(source, percent, fold, args.stratified)
            name = f"{path.stem}.{fold}@{str(percent).removesuffix('.0')}"
            yield _File(output / f"{name}.json", split, split.labeled, True)
            unlabeled = output / f"{name}-unlabeled.json"
            yield _File(unlabeled, split, split.unlabeled, False)
            if args.truth:
                truth = output / f"{name}-unlabeled-truth.json"
                yield _File(truth, split, split.unlabeled, True)


def _write_files(
    path: Path, source: CocoFile, files: list[_File], output: Path, overwrite: bool
) -> None:
    """Write the files and then the manifest; if one that is there differs, write nothing."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    made_of = {"file": path.name, "sha256": digest}
    manifest = output / f"{path.stem}.splits.json"
    entries = _read_manifest(manifest, made_of, overwrite)
    equal = set()
    for file in files:
        if file.path.exists():
            content = select(source, file.image_ids, file.labels)
            if file.path.read_bytes() == _encode(content):
                equal.add(file.path)
                entries[file.path.name] = _describe(file, content, source, "already there")
            elif not overwrite:
                raise InputError(
                    f"{file.path}: is there and differs from the split that was asked for; choose "
                    "another --output, or --overwrite"
                )
    for file in files:
        if file.path not in equal:
            content = select(source, file.image_ids, file.labels)
            _write(file.path, _encode(content))
            entries[file.path.name] = _describe(file, content, source, "written")
    content = {"source": made_of, "files": dict(sorted(entries.items()))}
    _write(manifest, json.dumps(content, indent=1).encode())
    print(f"{manifest}: written")


def _read_manifest(path: Path, made_of: dict[str, str], overwrite: bool) -> dict[str, Any]:
    """Return the entries of an earlier manifest of the same source, which stay."""
    if not path.exists():
        return {}
    try:
        content = load_object(path, "manifest")
    except InputError:
        content = {}
    if content.get("source") == made_of and isinstance(content.get("files"), dict):
        return content["files"]
    if overwrite:
        return {}
    raise InputError(
        f"{path}: is there and does not list splits of this {made_of['file']}; choose another "
        "--output, or --overwrite"
    )


def _describe(file: _File, content: dict[str, Any], source: CocoFile, done: str) -> dict[str, Any]:
    """Print what is in a file, and return its entry of the manifest."""
    boxes = count_boxes(content["annotations"], source.names)
    ids = hash_ids(file.image_ids)
    print(
        f"{file.path}: {done}, {len(file.image_ids)} images, {sum(boxes.values())} boxes, "
        f"{len(boxes)} of {len(source.names)} classes, ids {ids}"
    )
    return {
        "method": file.split.method,
        "percent": file.split.percent,
        "seed": file.split.fold,
        "images": len(file.image_ids),
        "ids_sha256": ids,
        "boxes": boxes,
    }


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _write(path: Path, text: bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(text)


def _check(labeled_path: str, unlabeled_path: str, source_path: str | None) -> None:
    """Check a pair of files, and print what is in them."""
    labeled = load_coco(labeled_path)
    unlabeled = load_coco(unlabeled_path, require_annotations=False)
    check_pair(labeled, unlabeled)
    if source_path:
        source = load_coco(source_path)
        for path, part in ((labeled_path, labeled), (unlabeled_path, unlabeled)):
            unknown = find_unknown(part, source)
            if unknown:
                raise InputError(
                    f"{path}: {len(unknown)} of {len(part.images)} images are not in "
                    f"{source_path} with this id and file name, among them "
                    f"{min(unknown, key=str)!r}: was the split made of another file?"
                )
        absent = len(source.images) - len(labeled.images) - len(unlabeled.images)
        print(f"{absent} images of {source_path} are in neither file")
    boxes = count_boxes(labeled.annotations.values(), labeled.names)
    rows = [
        {"class": name.encode(errors="backslashreplace").decode(), "boxes": number}
        for name, number in boxes.items()
    ]
    rows.append({"class": "all", "boxes": sum(boxes.values())})
    print(format_table(rows, ["class", "boxes"]))
    print(f"{len(boxes)} of {len(labeled.names)} classes have boxes")
    for path, part in ((labeled_path, labeled), (unlabeled_path, unlabeled)):
        print(f"{path}: {len(part.images)} images, ids {hash_ids(part.images)}")
    if unlabeled.content.get("annotations"):
        print(f"{unlabeled_path}: has annotations, which training does not read")
    print("no image is in both files")
