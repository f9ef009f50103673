"""
Reader of Pascal VOC annotations, one XML file an image.

Written by the VOC devkit, LabelImg, CVAT, Roboflow and others. Whatever is wrong with a file ends
as an `InputError` that names the file and the object.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ssod.data.images import IMAGE_SUFFIXES, read_image_size
from ssod.data.reading import MAX_SIDE, OnProblem, clip_box, skipping_boxes, stop
from ssod.data.records import DetectionDataset, ImageRecord
from ssod.errors import InputError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FILES = "annotation files"


def read_voc(
    path: str | Path,
    image_root: str | Path,
    *,
    like: DetectionDataset | None = None,
    skip_invalid_boxes: bool = False,
    on_problem: OnProblem = stop,
) -> DetectionDataset:
    """
    Read Pascal VOC annotations.

    The id of an image is the path of its XML file in the folder, without the suffix; in the order
    of the ids, or that of the list. Its file has the same name in `image_root` or in the same
    subfolder of it, with any suffix of an image; if there is none, `<filename>` is looked for.
    A missing or zero `<size>`, which some tools write, is read from the image.

    Boxes are XYXY = (xmin - 1, ymin - 1, xmax, ymax), clipped to the image: pixels are counted
    from 1 and the last one is inside, as the devkit defines it and Detectron2 reads it. A file
    does not say if its tool has counted from 0; such boxes are one pixel larger to the left and to
    the top. Difficult objects are kept, in training and in evaluation, as by Detectron2's COCO
    evaluator.

    Args:
        path: a folder, whose XML files are found in all subfolders but hidden ones; or a list of
            names in the `ImageSets/Main` of a VOC tree, whose XML files are in `Annotations`.
        image_root: folder of the images.
        like: a set whose classes these must be. None: the sorted names in the files, with category
            ids 1 to K.
        skip_invalid_boxes: leave boxes without area out, with one warning, instead of failing.
        on_problem: what to do about a file or an object that cannot be used; it is left out
            afterwards.

    Raises:
        InputError: if there is no annotation, a file is missing, damaged or not VOC, or a class is
            not one of `like`. With another `on_problem` only if nothing can be read.
    """
    finder = _ImageFinder(image_root)
    images: list[_Image] = []
    with skipping_boxes(path, skip_invalid_boxes, on_problem) as report:
        for image_id, xml in _find_files(path):
            try:
                images.append(_read_file(image_id, xml, finder, report))
            except InputError as error:
                report(_FILES, error)
    if not images:
        raise InputError(f"{path}: expected VOC annotations of images, but none can be read")
    if like is None:
        names = sorted({name for image in images for _, name in image.classes})
        if not names:
            raise InputError(f"{path}: {len(images)} files without any object, so without classes")
        category_ids = list(range(1, len(names) + 1))
    else:
        names, category_ids = like.class_names, like.category_ids
    class_of = {name: k for k, name in enumerate(names)}
    records = [image.make_record(class_of, on_problem) for image in images]
    return DetectionDataset(records, names, category_ids)


@dataclass
class _Image:
    """An image with its boxes; `classes` has for each where it was found and its name."""

    image_id: str
    file_name: str
    height: int
    width: int
    boxes: list[np.ndarray]
    classes: list[tuple[str, str]]

    def make_record(self, class_of: dict[str, int], on_problem: OnProblem) -> ImageRecord:
        boxes, classes = [], []
        for box, (where, name) in zip(self.boxes, self.classes, strict=True):
            if name in class_of:
                boxes.append(box)
                classes.append(class_of[name])
                continue
            known = ", ".join(class_of)
            message = f"{where}: class {name!r} is not one of the labeled images' ({known})"
            on_problem("classes", InputError(message))
        size = (self.height, self.width)
        return ImageRecord.from_rows(self.image_id, self.file_name, size, boxes, classes)


def _find_files(path: str | Path) -> Iterator[tuple[str, Path]]:
    """Yield ids and XML files of a folder or a list."""
    if os.path.isdir(path):
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                xml = Path(folder, name)
                if xml.suffix.lower() == ".xml" and not name.startswith("."):
                    yield xml.relative_to(path).with_suffix("").as_posix(), xml
        return
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"{path}: neither a folder of XML files nor a list of them") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a list of image names ({error})") from error
    tree = Path(path).absolute().parent.parent.parent
    # The same name twice would be two images with one id.
    for image_id in dict.fromkeys(filter(None, map(str.strip, lines))):
        yield image_id, tree / "Annotations" / f"{image_id}.xml"


class _ImageFinder:
    """Finds the image of an XML file; lists each folder once."""

    def __init__(self, root: str | Path):
        self._root = os.path.abspath(root)
        self._folders: dict[str, dict[str, list[str]]] = {}
        self._xml_of: dict[str, Path] = {}

    def find(self, image_id: str, xml: Path, name: str) -> str:
        """
        Return the absolute path of the image of an XML file, whose `<filename>` is `name`.

        Raises:
            InputError: if there is none, several, or another XML file has it.
        """
        xml_folder, xml_stem = os.path.split(image_id)
        name_folder, base = os.path.split(name.replace("\\", "/"))  # some are Windows paths
        stems = (xml_stem, os.path.splitext(base)[0], base)  # the last of a name without suffix
        for stem, subfolder in product(stems, (xml_folder, "", name_folder.lstrip("/"))):
            folder = os.path.join(self._root, subfolder)
            found = self._list(folder).get(stem, [])
            if len(found) > 1 and base in found:
                found = [base]
            if len(found) > 1:
                raise InputError(f"{xml}: {len(found)} images in {folder} fit: {sorted(found)}")
            if found:
                return self._claim(os.path.join(folder, found[0]), xml)
        raise InputError(
            f"{xml}: found neither an image {image_id!r} with a suffix of {sorted(IMAGE_SUFFIXES)} "
            f"nor its filename {name!r} in {self._root}: check the image folder"
        )

    def _list(self, folder: str) -> dict[str, list[str]]:
        """Return the image names of a folder by their stem."""
        if folder not in self._folders:
            stems = self._folders[folder] = defaultdict(list)
            try:
                names = os.listdir(folder)
            except (OSError, ValueError):  # ValueError: characters that no path can have
                names = []
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGE_SUFFIXES:
                    stems[stem].append(name)
        return self._folders[folder]

    def _claim(self, file_name: str, xml: Path) -> str:
        other = self._xml_of.setdefault(file_name, xml)
        if other != xml:
            raise InputError(f"{xml}: its image {file_name} has another annotation file, {other}")
        return file_name


def _read_file(image_id: str, xml: Path, finder: _ImageFinder, on_problem: OnProblem) -> _Image:
    try:
        root = ElementTree.fromstring(xml.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{xml}: annotation file not found") from error
    except OSError as error:
        raise InputError(f"{xml}: annotation file cannot be read ({error.strerror})") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # encodings raise the latter
        raise InputError(f"{xml}: expected an XML file, but it is not XML ({error})") from error
    if root.tag != "annotation":
        expected = "expected a Pascal VOC file, whose top element is <annotation>"
        raise InputError(f"{xml}: {expected}, but it is <{root.tag}>")
    file_name = finder.find(image_id, xml, _text(root, "filename"))
    height, width = (_read_side(xml, root, side) for side in ("height", "width"))
    if not height or not width:
        height, width = read_image_size(file_name)
    image = _Image(image_id, file_name, height, width, [], [])
    for index, element in enumerate(root.findall("object")):
        where = f"{xml}: object[{index}]"
        try:
            name = _text(element, "name")
            if not name:
                raise InputError(f"{where}: expected a class in <name>, but it is empty")
            x0, y0, x1, y1 = (_read_corner(where, element, corner) for corner in _CORNERS)
        except InputError as error:
            on_problem("annotations", error)
            continue
        box = clip_box(where, (x0 - 1, y0 - 1, x1, y1), height, width, on_problem)
        if box is not None:
            image.boxes.append(box)
            image.classes.append((where, name))
    return image


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _read_side(xml: Path, root: ElementTree.Element, side: str) -> int:
    """Return a side in pixels, 0 where it is not known."""
    text = _text(root, f"size/{side}") or "0"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_SIDE or value % 1:
        raise InputError(f"{xml}: size/{side} must be a number of pixels, got {text!r}")
    return int(value)


def _read_corner(where: str, element: ElementTree.Element, corner: str) -> float:
    text = _text(element, f"bndbox/{corner}")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < MAX_SIDE:  # True for NaN
        raise InputError(f"{where}: bndbox/{corner} must be a number of pixels, got {text!r}")
    return value
