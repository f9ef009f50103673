import copy
import json
import random

import numpy as np
import pytest

from ssod.data.datasets import read_coco
from ssod.errors import InputError


@pytest.fixture
def read(write_json, tmp_path):
    def read(content, **kwargs):
        return read_coco(write_json(content), tmp_path / "images", **kwargs)

    return read


def test_classes_are_category_ids_in_ascending_order(read, coco_content):
    dataset = read(coco_content)
    assert dataset.category_ids == [4, 9] and dataset.class_names == ["four", "nine"]
    assert dataset.image_ids == [1, 2, 7]
    assert dataset[0].classes.tolist() == [1, 0] and dataset[2].classes.tolist() == [1]
    assert dataset[0].boxes.tolist() == [[1, 2, 11, 10], [3.5, 0, 23.5, 24]]
    assert (dataset[1].height, dataset[1].width) == (40, 20)


def test_crowd_regions_are_left_out(read, coco_content):
    assert dataset_counts(read(coco_content)) == [2, 0, 1]
    coco_content["annotations"][-1]["iscrowd"] = 0
    assert dataset_counts(read(coco_content)) == [2, 1, 1]


def dataset_counts(dataset):
    return [len(dataset[i].boxes) for i in range(len(dataset))]


def test_boxes_are_clipped_to_the_image(read, coco_content):
    coco_content["annotations"][0]["bbox"] = [-5, -3, 100, 10]
    assert read(coco_content)[0].boxes[0].tolist() == [0, 0, 32, 7]


def test_unlabeled_file_needs_only_images(read, coco_content):
    dataset = read({"images": coco_content["images"]}, require_annotations=False)
    assert dataset.image_ids == [1, 2, 7] and dataset.num_classes == 0


def test_annotations_of_unlabeled_files_are_dropped_unread(read, coco_content):
    dataset = read(coco_content, require_annotations=False)
    assert dataset_counts(dataset) == [0, 0, 0] and dataset.class_names == ["four", "nine"]
    coco_content["annotations"] = "rubbish"
    read(coco_content, require_annotations=False)


def test_names_with_spaces_and_unicode(write_image, write_json, tmp_path):
    write_image("bilder ü/straße 1.png")
    image = {"id": "straße", "file_name": "straße 1.png", "height": 24, "width": 32}
    path = write_json({"images": [image]}, "ännotations 1.json")
    dataset = read_coco(path, tmp_path / "bilder ü", require_annotations=False)
    assert dataset.image_ids == ["straße"]


def _set(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    content[last] = value


BAD_FILES = [
    ("{", "is not JSON"),
    ("[]", "its top level is a list"),
    ("[" * 100_000, "is not JSON"),
    ("{}", "the key 'images' is missing"),
    ('{"images": []}', "'images' is empty"),
    ('{"images": 3, "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "'images' is not"),
]
BAD_ENTRIES = [
    (("images", 1, "id"), None, r"images\[1\] \(id None\): id must be an integer or a string"),
    (("images", 1, "id"), 1, r"images\[1\] \(id 1\): the id of an image must be unique"),
    (("images", 0, "file_name"), 5, r"images\[0\] .*: file_name must be a path, got 5"),
    (("images", 2, "height"), 0, r"images\[2\] \(id 7\): height must be .*, got 0"),
    (("images", 2, "width"), "3", r"images\[2\] .*: width must be .*, got '3'"),
    (("categories", 1, "id"), 9, r"categories\[1\] \(id 9\): the id of a category"),
    (("categories", 1, "id"), "x", r"categories\[1\] .*: id must be an integer, got 'x'"),
    (("categories", 0, "name"), None, r"categories\[0\] .*: name must be a string"),
    (("categories",), [], "'categories' is empty"),
    (("annotations", 2), [], "'annotations' is not a list of objects"),
    (("annotations", 1, "image_id"), 3, r"annotations\[1\] \(id 1\): image_id 3 is not"),
    (("annotations", 1, "image_id"), [1], r"image_id \[1\] is not the id"),
    (("annotations", 1, "category_id"), 5, r"annotations\[1\] .*: category_id 5 is not"),
    (("annotations", 0, "bbox"), [1, 2, 3], r"annotations\[0\] .* 4 finite numbers .*\[1, 2, 3\]"),
    (("annotations", 0, "bbox"), [1, 2, float("nan"), 3], "4 finite numbers"),
    (("annotations", 0, "bbox"), [1, 2, float("inf"), 3], "4 finite numbers"),
    (("annotations", 0, "bbox"), [1, 2, 10**400, 3], "4 finite numbers"),
    (("annotations", 0, "bbox"), [1, 2, "4", 3], "4 finite numbers"),
    (("annotations", 0, "bbox"), None, "4 finite numbers"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_what_is_not_coco_is_an_input_error(read, text, message):
    with pytest.raises(InputError, match=f"annotations.json: .*({message})"):
        read(text)


@pytest.mark.parametrize(("path", "value", "message"), BAD_ENTRIES)
def test_bad_entries_are_named(read, coco_content, path, value, message):
    _set(coco_content, path, value)
    with pytest.raises(InputError, match=f"annotations.json: .*{message}") as error:
        read(coco_content)
    assert "\n" not in str(error.value)


BAD_BOXES = [[1, 2, 0, 5], [1, 2, 5, -1], [40, 2, 5, 5], [1, -9, 5, 5], [30, 2, 1e-12, 5]]


@pytest.mark.parametrize("bbox", BAD_BOXES)
def test_box_without_area(read, coco_content, bbox, caplog):
    coco_content["annotations"][0]["bbox"] = bbox
    with pytest.raises(InputError, match=r"\[0\] \(id 0\).*set SSOD.DATA.SKIP_INVALID_BOXES True"):
        read(coco_content)
    dataset = read(coco_content, skip_invalid_boxes=True)
    assert dataset_counts(dataset) == [1, 0, 1]
    assert caplog.messages == [m for m in caplog.messages if "left out 1 boxes" in m][:1]


def test_missing_files(read, coco_content, tmp_path):
    with pytest.raises(InputError, match=r"nothing\.json: annotation file not found"):
        read_coco(tmp_path / "nothing.json", tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_coco(tmp_path, tmp_path)
    (tmp_path / "images/2.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 image files are missing, the first is .*2\.png"):
        read(coco_content)
    with pytest.raises(InputError, match="3 of 3 image files"):
        read_coco(tmp_path / "annotations.json", tmp_path / "elsewhere")


def _mutate(content, rng):
    """Replace, remove or repeat one random value of a nested structure."""
    parent = content
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(parent[key], (dict, list)) and rng.random() < 0.8:
            parent = parent[key]
            continue
        action = rng.randrange(4)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            junk = [None, True, -1, 0, 1.5, 1e300, 10**30, "", "a\0b", "\ud800", [], [[1]], {}]
            parent[key] = rng.choice([*junk, float("nan"), {"id": []}, [1, 2, 3, 4], "../1.png"])
        return


@pytest.mark.parametrize("require_annotations", [True, False])
def test_any_damage_is_an_input_error_or_harmless(coco_content, read, require_annotations):
    rng = random.Random(0)
    outcomes = []
    for _ in range(200):
        content = copy.deepcopy(coco_content)
        for _ in range(rng.randint(1, 3)):
            _mutate(content, rng)
        text = json.dumps(content)
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        try:
            dataset = read(text, require_annotations=require_annotations)
            outcomes.append("read")
            assert np.isfinite(dataset[0].boxes).all()
        except InputError as error:
            outcomes.append("refused")
            assert "annotations.json" in str(error) and "\n" not in str(error)
    assert min(outcomes.count("read"), outcomes.count("refused")) > 10
