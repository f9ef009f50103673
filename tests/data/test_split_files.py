import copy
import hashlib
import json
import random

import pytest

from ssod.data.coco_file import load_coco
from ssod.data.split_files import (
    check_pair,
    count_boxes,
    hash_ids,
    read_source,
    read_unbiased_teacher,
    select,
    split_source,
)
from ssod.data.splits import make_split
from ssod.errors import InputError

NUM_IMAGES = 40
CROWD_ONLY, EMPTY = 6, 9  # ids of two images without boxes


@pytest.fixture
def content():
    """COCO content without image files; ids are not in order."""
    ids = [3 * i for i in range(NUM_IMAGES)][::-1]
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": 10, "width": 20, "neg_category_ids": [1]}
        for i in ids
    ]
    rng = random.Random(0)
    annotations = [
        {"image_id": i, "category_id": rng.choice([1, 7]), "bbox": [0, 0, 5, 5]}
        | {"iscrowd": int(i == CROWD_ONLY)}
        for i in ids
        for _ in range(rng.randint(1, 3))
        if i != EMPTY
    ]
    rng.shuffle(annotations)
    annotations = [{"id": n, **entry} for n, entry in enumerate(annotations)]
    categories = [{"id": 7, "name": "dog"}, {"id": 1, "name": "cat"}]
    return {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "CC"}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
        "captions": ["a cat"],
    }


@pytest.fixture
def source(content, write_json):
    return read_source(write_json(content))


def test_parts_have_each_entry_once(content, source):
    split = split_source(source, 30, 2, stratified=False)
    labeled = select(source, split.labeled, labels=True)
    truth = select(source, split.unlabeled, labels=True)
    for part, ids in ((labeled, split.labeled), (truth, split.unlabeled)):
        assert part["images"] == [e for e in content["images"] if e["id"] in ids]
        assert part["annotations"] == [e for e in content["annotations"] if e["image_id"] in ids]
        for key in ("info", "licenses", "categories"):
            assert part[key] == content[key]
    assert len(labeled["images"]) == 12
    for key in ("images", "annotations"):
        ids = sorted(entry["id"] for part in (labeled, truth) for entry in part[key])
        assert ids == sorted(entry["id"] for entry in content[key])


def test_unlabeled_part_tells_nothing_of_its_images(content, source):
    split = split_source(source, 30, 2, stratified=False)
    unlabeled = select(source, split.unlabeled, labels=False)
    assert unlabeled.keys() == {"info", "licenses", "categories", "images", "annotations"}
    assert unlabeled["annotations"] == []
    truth = select(source, split.unlabeled, labels=True)
    shown = ("id", "file_name", "height", "width")
    assert unlabeled["images"] == [{key: e[key] for key in shown} for e in truth["images"]]


def test_uniform_split_is_that_of_the_hash(source):
    for percent, fold in ((2.5, 1), (10, 1), (10, 5)):
        split = split_source(source, percent, fold, stratified=False)
        assert split.labeled == set(make_split(source.images, percent, fold))
        assert split.labeled.isdisjoint(split.unlabeled)
        assert split.labeled | split.unlabeled == source.images.keys()
    small, large = (split_source(source, p, 1, stratified=False).labeled for p in (10, 20))
    assert small < large


def test_stratified_split_counts_no_crowd(content, write_json):
    content["categories"].append({"id": 9, "name": "rare"})
    entry = {"image_id": EMPTY, "category_id": 9, "bbox": [0, 0, 1, 1], "iscrowd": 0}
    content["annotations"].append({"id": 1000, **entry})
    split = split_source(read_source(write_json(content)), 3, 0, stratified=True)
    assert EMPTY in split.labeled
    content["annotations"][-1]["iscrowd"] = 1
    # Of images without boxes, none is in 3 percent.
    split = split_source(read_source(write_json(content)), 3, 0, stratified=True)
    assert EMPTY not in split.labeled


def test_split_that_leaves_nothing(source):
    with pytest.raises(InputError, match="99.0 percent of 40 images .* none unlabeled: choose"):
        split_source(source, 99.0, 0, stratified=False)


def test_one_file_under_two_ids_is_refused(content, write_json):
    content["images"][3]["file_name"] = "./0.jpg"
    with pytest.raises(InputError, match=r"images 108 and 0 are the same file '0\.jpg'"):
        read_source(write_json(content))


def test_hash_does_not_depend_on_the_order():
    expected = hashlib.sha256(b"1\n10\n9").hexdigest()
    assert hash_ids([9, 10, 1]) == hash_ids(["1", "9", "10"]) == expected
    assert hash_ids(["\ud800"]) != hash_ids(["\ud801"])


def test_count_boxes(source, content):
    counts = count_boxes(source.annotations.values(), source.names)
    for name, category_id in (("cat", 1), ("dog", 7)):
        entries = [e for e in content["annotations"] if e["category_id"] == category_id]
        assert counts[name] == sum(e["iscrowd"] == 0 for e in entries) > 10
    assert list(counts) == ["cat", "dog"] and count_boxes([], source.names) == {}


def _pair(write_json, images, other):
    parts = []
    for name, entries in (("one", images), ("two", other)):
        entries = [{"id": i, "file_name": f, "height": 1, "width": 1} for i, f in entries]
        path = write_json({"images": entries}, f"{name}.json")
        parts.append(load_coco(path, require_annotations=False))
    return parts


def test_leaks(write_json):
    images = [(1, "a.jpg"), (2, "b/c.jpg"), (3, "d.jpg")]
    check_pair(*_pair(write_json, images, [(4, "e.jpg"), ("5", "c.jpg")]))
    with pytest.raises(InputError, match="leak: 2 of 3 labeled .* among them id 2: remove"):
        check_pair(*_pair(write_json, images, [(2, "z.jpg"), (3, "d.jpg"), (4, "y.jpg")]))
    pair = _pair(write_json, images, [(4, "e.jpg"), (5, "./b//c.jpg")])
    with pytest.raises(InputError, match=r"leak: 1 of 3 .* another id, .*'b/c.jpg' .* 2 and 5"):
        check_pair(*pair)


@pytest.fixture
def read_index(source, write_json):
    def read(index, name="train.json", percent=10.0, fold=1):
        return read_unbiased_teacher(write_json(index, "index"), source, name, percent, fold)

    return read


def test_positions_count_images_with_boxes_by_ascending_id(source, read_index):
    split = read_index({"10.0": {"0": [1, 3, 4], "1": [0, 3, 37]}})
    # Ids are 0, 3, 6 ... 117; the third and fourth have no box.
    assert split.labeled == {0, 15, 117} and (split.percent, split.fold) == (10.0, 1)
    assert split.unlabeled == source.images.keys() - {0, 15, 117, CROWD_ONLY, EMPTY}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "must be a JSON object, but its top level is a list"),
        ({"5.0": {"1": [1]}}, r"no entry '10\.0' for percent 10.0, fold 1; found '5\.0'"),
        ({"10.0": {"0": [1], "2": [2]}}, "no entry '1' .* found '0', '2'"),
        ({"10.0": [1, 2, 3]}, "no entry '1' .* found \\[1, 2, 3\\]"),
        ({"10.0": {"1": {}}}, "must be a list of different positions"),
        ({"10.0": {"1": []}}, "must be a list of different positions"),
        ({"10.0": {"1": [1, 2, 2]}}, "must be a list of different positions"),
        ({"10.0": {"1": [1, -2, 3]}}, "must be a list of different positions"),
        ({"10.0": {"1": [1, True, 3]}}, "must be a list of different positions"),
        ({"10.0": {"1": [1, [2], 3]}}, "must be a list of different positions"),
        ({"10.0": {"1": [1, 2, 38]}}, r"38 images with boxes, but .*index has 3 .* up to 38 as 10"),
        ({"10.0": {"1": [1, 2, 3, 4]}}, "38 images with boxes, but .*index has 4 positions up to"),
    ],
)
def test_index_that_does_not_fit(read_index, index, message):
    with pytest.raises(InputError, match=message):
        read_index(index)


def test_index_of_train2017_needs_all_of_it(read_index):
    index = {"10.0": {"1": [0, 3, 37]}}
    with pytest.raises(InputError, match="38 images with boxes, but train2017 has 117266"):
        read_index(index, "instances_train2017.json")


JUNK = [None, True, 1.5, 10**30, "", "\ud800", [[1]], {"id": []}]


def _places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def _damaged(content, path, junk):
    if not path:
        return junk
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = junk
    return content


def test_any_damage_is_an_input_error_or_harmless(content, write_json):
    content["images"] = content["images"][-3:]  # ids 6, 3, 0
    content["annotations"] = [e for e in content["annotations"] if e["image_id"] < 4][:2]
    outcomes = []
    for path in _places(content):
        for junk in JUNK:
            file = write_json(json.dumps(_damaged(content, path, junk)))
            try:
                source = read_source(file)
                for stratified in (False, True):
                    split = split_source(source, 40, 1, stratified)
                    json.dumps(select(source, split.labeled, labels=True))
                    json.dumps(select(source, split.unlabeled, labels=False))
                outcomes.append("split")
            except InputError:
                outcomes.append("refused")
    assert min(outcomes.count("split"), outcomes.count("refused")) > 50
