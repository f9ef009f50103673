import hashlib
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from ssod.data.check import (
    Findings,
    check_classes,
    check_files,
    check_overlap,
    describe_sets,
    read_facts,
    scan_files,
)
from ssod.data.datasets import read_coco, read_image_folder
from ssod.data.records import DetectionDataset, ImageRecord

PIXELS = np.random.default_rng(0).integers(256, size=(12, 8, 3), dtype=np.uint8)
KINDS = {
    "gray.jpg": lambda image: image.convert("L"),
    "cmyk.jpg": lambda image: image.convert("CMYK"),
    "deep.png": lambda image: Image.fromarray(np.full((12, 8), 40_000, np.uint16)),
    "palette.png": lambda image: image.quantize(8),
    "alpha.webp": lambda image: image.convert("RGBA"),
    "bits.tiff": lambda image: image.convert("1"),
    "straße 1.bmp": lambda image: image,
}


def _dataset(*entries, names=("a", "b")):
    """Return a set of images: a file, height, width and the classes of its boxes."""
    records = [
        ImageRecord(
            *(index, str(file), height, width),
            np.tile(np.array([[0, 0, 2, 2]], np.float32), (len(classes), 1)),
            np.array(classes, np.int64),
        )
        for index, (file, height, width, classes) in enumerate(entries)
    ]
    return DetectionDataset(records, names, range(1, len(names) + 1))


def _scan(*datasets):
    return scan_files([n for d in datasets for n in d.file_names], 0, lambda count: None)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_is_read_and_hashed(name, tmp_path):
    path = tmp_path / name
    KINDS[name](Image.fromarray(PIXELS)).save(path)
    facts = read_facts(str(path))
    assert facts.size == (12, 8) and facts.problem is None
    assert facts.digest == hashlib.sha256(path.read_bytes()).digest()


def test_size_is_that_of_the_upright_image(tmp_path):
    path, exif = tmp_path / "side.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(path, exif=exif)
    assert read_facts(str(path)).size == (8, 12)
    findings, stored = Findings(), _dataset((path, 12, 8, []))
    check_files("labeled", stored, _scan(stored), findings)
    ((message,),) = findings.errors.values()
    assert "say 8 x 12" in message and "has 12 x 8; turn the boxes" in message
    findings, upright = Findings(), _dataset((path, 8, 12, []))
    check_files("labeled", upright, _scan(upright), findings)
    assert not findings.errors


def test_files_that_cannot_be_used_are_told_apart(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(PIXELS).save(whole)
    content = whole.read_bytes()
    for name, part in (("cut.jpg", content[:-40]), ("empty.jpg", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(part)
    names = ("whole.jpg", "cut.jpg", "empty.jpg", "text.png", "gone.png", "a\0b.png")
    dataset = _dataset(*((tmp_path / name, 12, 8, []) for name in names))
    findings = Findings()
    check_files("val", dataset, _scan(dataset), findings)
    assert {kind: len(found) for kind, found in findings.errors.items()} == {
        "images that cannot be read": 4,
        "missing image files": 1,
    }
    cut, empty, text, null = findings.errors["images that cannot be read"]
    assert cut.startswith(f"val, image 1: {tmp_path / 'cut.jpg'}: ") and "truncated" in cut
    assert "0 bytes" in empty and "format is unknown" in text and "null" in null


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFF headers
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp"])
def test_any_damage_is_reported_and_never_raised(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(PIXELS).save(path)
    content, rng = path.read_bytes(), random.Random(0)
    damaged = [content[:end] for end in range(0, len(content), max(1, len(content) // 20))]
    for _ in range(20):
        place = rng.randrange(len(content))
        damaged.append(content[:place] + rng.randbytes(4) + content[place + 4 :])
    problems = 0
    for part in damaged:
        path.write_bytes(part)
        facts = read_facts(str(path))
        assert (facts.problem is None) == (facts.size is not None)
        problems += facts.problem is not None
    assert problems > 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_are_read_once_and_counted(num_workers, tmp_path):
    names = [tmp_path / f"{index}.png" for index in range(40)]
    for index, name in enumerate(names):
        Image.new("L", (4, 5 + index)).save(name)
    counts = []
    facts = scan_files([str(n) for n in [*names, *names[:3]]], num_workers, counts.append)
    assert sum(counts) == 40
    assert [facts[str(name)].size for name in names] == [(5 + i, 4) for i in range(40)]


def test_same_content_under_another_name_is_found(tmp_path):
    for name, level in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        Image.new("L", (4, 4), level).save(tmp_path / f"{name}.png")
    for source, copy in (("a", "e"), ("b", "f"), ("b", "g")):
        shutil.copy(tmp_path / f"{source}.png", tmp_path / f"{copy}.png")

    def of(letters):
        return _dataset(*((tmp_path / f"{letter}.png", 4, 4, []) for letter in letters))

    sets = {"labeled": of("ab"), "unlabeled": of("ecd"), "validation": of("fg")}
    findings = Findings()
    check_overlap(sets, _scan(*sets.values()), findings)
    (errors,) = findings.errors.values()
    assert [(m.split(" ")[0], m.split(" ")[6]) for m in errors] == [
        (str(tmp_path / f"{copy}.png"), str(tmp_path / f"{first}.png"))
        for copy, first in (("e", "a"), ("f", "b"), ("g", "b"))
    ]
    findings = Findings()
    check_overlap({"labeled": of("aec"), "val": of("d")}, _scan(of("aecd")), findings)
    assert not findings.errors and list(map(len, findings.warnings.values())) == [1]
    # Images that are unlabeled and measured on: the same file, and a copy of it.
    findings = Findings()
    check_overlap({"unlabeled": of("ab"), "val": of("ae")}, _scan(of("abe")), findings)
    assert not findings.errors
    assert [message.split(" (")[0] for message in findings.warnings["images in two sets"]] == [
        str(tmp_path / f"{letter}.png") for letter in "ae"
    ]


def test_broken_files_are_not_the_same_image(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"")
    sets = {n: _dataset((tmp_path / f"{n}.png", 4, 4, [])) for n in "ab"}
    findings = Findings()
    check_overlap(sets, _scan(*sets.values()), findings)
    assert not findings.errors and not findings.warnings


def test_sets_are_described_and_empty_classes_found():
    labeled = _dataset(("x", 10, 20, [0, 0]), ("y", 30, 20, []), ("z", 20, 25, [2]), names="abc")
    other = _dataset(("v", 5, 6, [0]), names="a")
    bare = _dataset(("u", 5, 6, []), names="")
    sets = {"labeled": labeled, "unlabeled": bare, "val": other}
    rows, classes = describe_sets(sets, ["labeled", "val"])
    assert rows[0] == {
        **{"set": "labeled", "images": 3, "boxes": 3, "without boxes": 1},
        **{"boxes an image": "0 / 1 / 2", "width": "20 / 20 / 25", "height": "10 / 20 / 30"},
    }
    assert rows[1] == {"set": "unlabeled", "images": 1, "width": "6 / 6 / 6", "height": "5 / 5 / 5"}
    counts = [(row["class"], row["labeled"], row["val"]) for row in classes]
    assert counts == [("a", 2, 1), ("b", 0, 0), ("c", 1, 0)]
    findings = Findings()
    check_classes("labeled", labeled, findings)
    assert dict(findings.warnings) == {"classes without boxes": ["labeled: 'b' has no box"]}


def test_all_problems_of_a_coco_file_are_collected(coco_content, write_json, tmp_path):
    first, second, third, _ = coco_content["annotations"]
    first["bbox"], second["category_id"], third["image_id"] = [1, 2, 0, 5], 77, "x"
    more = {"image_id": 1, "category_id": 9, "iscrowd": 0}
    coco_content["annotations"] += [
        more | {"id": 20, "bbox": "box"},
        more | {"id": 20, "bbox": [-9, 2, 20, 9]},
        more | {"id": 21, "bbox": [-0.9, 2, 20, 9]},
    ]
    coco_content["images"].append(coco_content["images"][0])
    coco_content["categories"].append({"id": "1", "name": "one"})
    (tmp_path / "images" / "2.png").unlink()
    path, findings = write_json(coco_content), Findings()
    dataset = read_coco(path, tmp_path / "images", on_problem=findings.collect)
    assert {kind: len(found) for kind, found in findings.errors.items()} == {
        "image entries": 1,
        "categories": 1,
        "annotations": 3,
        "boxes without area": 1,
    }
    assert {kind: len(found) for kind, found in findings.warnings.items()} == {
        "boxes that reach out of their image": 1,
        "annotation ids that are repeated": 1,
    }
    assert dataset.image_ids == [1, 2, 7] and dataset.class_counts.tolist() == [0, 2]
    findings = Findings()
    options = {"skip_invalid_boxes": True, "on_problem": findings.collect}
    read_coco(path, tmp_path / "images", **options)
    assert len(findings.warnings["boxes without area, left out"]) == 1


def test_unreadable_files_of_a_folder_are_collected(write_image, tmp_path):
    write_image("folder/a.png")
    (tmp_path / "folder" / "b.png").write_text("hello")
    findings = Findings()
    dataset = read_image_folder(tmp_path / "folder", [], [], findings.collect)
    assert dataset.image_ids == ["a.png"]
    ((message,),) = findings.errors.values()
    assert "b.png: cannot be read as an image" in message
