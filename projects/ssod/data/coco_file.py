"""
COCO annotation files as they are: entries, ids and references, without images and boxes.

Whatever is wrong with a file ends as an `InputError` that names the file and the entry.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod.data.reading import MAX_SIDE, REPEATED, OnProblem, stop
from ssod.errors import InputError


@dataclass(frozen=True, eq=False)
class CocoFile:
    """
    An annotation file whose ids and references are right; boxes are not looked at.

    Attributes:
        content: everything that the file has.
        images: entries of `images` by id, in the order of the file.
        annotations: entries of `annotations` by their place, empty if they were not asked for.
        names: category names by ascending id.
    """

    content: dict[str, Any]
    images: dict[int | str, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    names: dict[int, str]


def load_coco(
    json_path: str | Path, *, require_annotations: bool = True, on_problem: OnProblem = stop
) -> CocoFile:
    """
    Read a COCO annotation file as it is; no image file is looked for.

    Arguments are those of `read_coco`.

    Raises:
        InputError: if the file is missing or not valid COCO; as in `read_coco`.
    """
    content = load_object(json_path, "annotation file")
    images = _by_id(json_path, content, "images", True, _check_image, on_problem)
    categories = _by_id(
        json_path, content, "categories", require_annotations, _check_category, on_problem
    )
    names = {category_id: categories[category_id]["name"] for category_id in sorted(categories)}
    annotations: dict[int, dict[str, Any]] = {}
    if require_annotations:
        entries = _entries(json_path, content, "annotations", required=True)
        for index, entry in enumerate(entries):
            try:
                _check_references(json_path, index, entry, images, names)
            except InputError as error:
                on_problem("annotations", error)
            else:
                annotations[index] = entry
        _check_repeated(json_path, entries, on_problem)
    return CocoFile(content, images, annotations, names)


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Return whether an annotation is a region of many objects, which no box is learned from."""
    return annotation.get("iscrowd", 0) == 1


def load_object(path: str | Path, what: str) -> dict[str, Any]:
    """
    Read a JSON file that holds an object; `what` the file is stands in errors.

    Raises:
        InputError: if it is missing, not JSON, or another value than an object.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: {what} not found") from error
    except OSError as error:
        raise InputError(f"{path}: {what} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file, but it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: {what} must be a JSON object, but its top level is a {type(content).__name__}"
        )
    return content


def _entries(
    path: str | Path, content: dict[str, Any], key: str, required: bool
) -> list[dict[str, Any]]:
    if required and key not in content:
        raise InputError(f"{path}: expected a COCO file, but the key {key!r} is missing")
    entries = content.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: expected a COCO file, but {key!r} is not a list of objects")
    if required and not entries and key != "annotations":
        raise InputError(f"{path}: {key!r} is empty, at least one entry is needed")
    return entries


def describe_entry(path: str | Path, key: str, index: int, entry: dict[str, Any]) -> str:
    """Return how messages name an entry of a file."""
    return f"{path}: {key}[{index}] (id {entry.get('id')!r})"


def is_int(value: Any) -> bool:
    """Return whether a value of a JSON is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return is_int(value) or isinstance(value, str)


def _by_id(
    path: str | Path,
    content: dict[str, Any],
    key: str,
    required: bool,
    check: Callable[[str, dict[str, Any]], None],
    on_problem: OnProblem,
) -> dict[Any, dict[str, Any]]:
    """Return the entries of a list by their ids, in its order."""
    what, kind = ("an image", "image entries") if key == "images" else ("a category", key)
    found: dict[Any, dict[str, Any]] = {}
    for index, entry in enumerate(_entries(path, content, key, required)):
        where = describe_entry(path, key, index, entry)
        try:
            check(where, entry)
            if entry["id"] in found:
                raise InputError(f"{where}: the id of {what} must be unique")
        except InputError as error:
            on_problem(kind, error)
            continue
        found[entry["id"]] = entry
    return found


def _check_category(where: str, entry: dict[str, Any]) -> None:
    category_id, name = entry.get("id"), entry.get("name")
    if not is_int(category_id):
        raise InputError(f"{where}: id must be an integer, got {category_id!r}")
    if not isinstance(name, str):
        raise InputError(f"{where}: name must be a string, got {name!r}")


def _check_image(where: str, entry: dict[str, Any]) -> None:
    image_id, file_name = entry.get("id"), entry.get("file_name")
    if not _is_id(image_id):
        raise InputError(f"{where}: id must be an integer or a string, got {image_id!r}")
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where}: file_name must be a path, got {file_name!r}")
    for key in ("height", "width"):
        side = entry.get(key)
        if not is_int(side) or not 0 < side <= MAX_SIDE:
            raise InputError(f"{where}: {key} must be a number of pixels, got {side!r}")


def _check_references(
    path: str | Path,
    index: int,
    entry: dict[str, Any],
    images: dict[int | str, dict[str, Any]],
    names: dict[int, str],
) -> None:
    """Make sure that the image id and the category id of an annotation are known."""
    for key, known, is_valid, group in (
        ("image_id", images, _is_id, "images"),
        ("category_id", names, is_int, "categories"),
    ):
        found = entry.get(key)
        if not is_valid(found) or found not in known:
            where = describe_entry(path, "annotations", index, entry)
            raise InputError(f"{where}: {key} {found!r} is not the id of an entry of {group!r}")


def _check_repeated(path: str | Path, entries: list[dict[str, Any]], on_problem: OnProblem) -> None:
    ids = Counter(entry["id"] for entry in entries if _is_id(entry.get("id")))
    for annotation_id in (i for i, count in ids.items() if count > 1):
        message = f"{path}: {ids[annotation_id]} annotations have the id {annotation_id!r}"
        on_problem(REPEATED, InputError(f"{message}; some tools read one of them only"))
