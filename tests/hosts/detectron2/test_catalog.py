"""Data sets of Detectron2's catalog."""

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from ssod.data.datasets import read_coco
from ssod.data.index import write_index
from ssod.data.splits import make_split
from ssod.errors import InputError
from ssod.hosts.detectron2 import catalog
from tiny_detectron2 import tiny_config
from tiny_run import SPEC

NO_FILES = [
    item
    for group, ends in (
        ("LABELED", ("JSON", "IMAGES")),
        ("UNLABELED", ("JSON", "IMAGES", "TRUTH_JSON")),
        ("VAL", ("JSON", "IMAGES")),
    )
    for end in ends
    for item in (f"SSOD.DATA.{group}_{end}", "")
]
NO_UNLABELED = NO_FILES[4:10]
SUPERVISED = (*NO_FILES, "SSOD.UNSUP_LOSS_WEIGHT", 0)
CLASSES = ["cat", "dog"]
NUMBERS = itertools.count()  # of the names registered here
BOX = {"bbox": [1, 2, 5, 6], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}


@pytest.fixture
def register():
    """Register entries, or a COCO file and its images; returns the name."""

    def register(source, images=None, **metadata):
        name = f"ssod_data_{next(NUMBERS)}"
        if images is None:
            DatasetCatalog.register(name, lambda: source)
            MetadataCatalog.get(name).set(**metadata)
        else:
            register_coco_instances(name, metadata, str(source), str(images))
        return name

    return register


@pytest.fixture
def coco_set(register, shapes):
    """Register an annotation file of the Shapes set."""
    return lambda name: register(shapes / "annotations" / f"{name}.json", shapes / "images")


@pytest.fixture
def entries(tmp_path):
    """Make images of 20 x 10 pixels, and their entries with these annotations."""

    def make(*annotations, name="image", **keys):
        made = []
        for index, found in enumerate(annotations):
            path = tmp_path / f"{name}_{index}.png"
            Image.new("RGB", (20, 10)).save(path)
            entry = {"file_name": str(path), "image_id": index, "height": 10, "width": 20}
            made.append(entry | {"annotations": found} | keys)
        return made

    return make


@pytest.fixture
def load(shapes):
    """Load the data of the tiny config with overrides."""
    return lambda *overrides: catalog.load_run_data(tiny_config(shapes, "unused", *overrides))


def _assert_same(actual, expected):
    assert actual.image_ids == expected.image_ids
    assert actual.file_names == expected.file_names
    assert actual.class_names == expected.class_names
    assert actual.category_ids == expected.category_ids
    assert len(actual) == len(expected) > 0
    for index in range(len(expected)):
        one, other = actual[index], expected[index]
        assert (one.height, one.width) == (other.height, other.width)
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.classes, other.classes)
        assert (one.boxes.dtype, one.classes.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("name", ["labeled", "val"])
def test_coco_file_is_the_same_through_the_catalog(name, coco_set, shapes):
    expected = read_coco(shapes / "annotations" / f"{name}.json", shapes / "images")
    _assert_same(catalog.read_catalog([coco_set(name)]), expected)
    assert expected.class_counts.sum() > 0 and expected.category_ids[-1] > 6


def test_boxes_are_converted_and_clipped_and_crowds_left_out(register, entries):
    annotations = [
        {"bbox": [1, 2, 5.5, 6], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1},
        {"bbox": (1, 2, 5.5, 6), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0},
        {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1},
        BOX | {"bbox": np.array([-3, -4, 90, 80.0]), "segmentation": [[1, 1, 2, 2, 3, 3]]},
        BOX | {"bbox": np.array([15, 5, 10, 10]), "bbox_mode": 1, "category_id": np.int64(0)},
    ]
    name = register(entries(annotations, []), thing_classes=CLASSES)
    found = catalog.read_catalog([name])
    expected = [[1, 2, 5.5, 6], [1, 2, 6.5, 8], [0, 0, 20, 10], [15, 5, 20, 10]]
    assert found[0].boxes.tolist() == expected
    assert found[0].classes.tolist() == [1, 0, 1, 0]
    assert found[1].boxes.shape == (0, 4) and len(found) == 2
    assert (found.class_names, found.category_ids) == (CLASSES, [0, 1])


def test_size_is_read_from_the_file_if_it_is_not_known(register, entries):
    found = entries([BOX | {"bbox": [0, 0, 99, 99]}])
    del found[0]["height"], found[0]["width"]
    (record,) = catalog.read_catalog([register(found, thing_classes=CLASSES)])
    assert (record.height, record.width) == (10, 20)
    assert record.boxes.tolist() == [[0, 0, 20, 10]]


def test_ids_of_categories_are_those_of_the_metadata(register, entries):
    ids = {7: 1, 30: 0}
    name = register(entries([BOX]), thing_classes=CLASSES, thing_dataset_id_to_contiguous_id=ids)
    assert catalog.read_catalog([name]).category_ids == [30, 7]


def test_boxes_without_area_stop_or_are_left_out_with_one_warning(register, entries, caplog):
    flat, outside = BOX | {"bbox": [3, 3, 3, 9]}, BOX | {"bbox": [30, 1, 40, 5]}
    name = register(entries([BOX, flat], [outside]), thing_classes=CLASSES)
    message = r"image_0.png: annotations\[1\]: box .* has no area .*SKIP_INVALID_BOXES True"
    with pytest.raises(InputError, match=message):
        catalog.read_catalog([name])
    found = catalog.read_catalog([name], skip_invalid_boxes=True)
    assert [len(found[i].boxes) for i in range(2)] == [1, 0]
    assert caplog.messages == [f"{name}: left out 2 boxes without area"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bbox": [1, 2, 3, 4, 5]},
            r"annotations\[0\]: bbox must be 4 finite numbers \[x0, y0, x1, y1\]",
        ),
        ({"bbox": [1, 2, float("nan"), 4]}, "bbox must be 4 finite numbers"),
        ({"bbox": None}, "bbox must be 4 finite numbers"),
        ({"bbox": 7}, "bbox must be 4 finite numbers"),
        ({"bbox": np.ones((4, 4))}, "bbox must be 4 finite numbers"),
        ({"bbox": ["a", 1, 2, 3]}, "bbox must be 4 finite numbers"),
        ({"bbox_mode": BoxMode.XYXY_REL}, "bbox_mode must be XYXY_ABS or XYWH_ABS"),
        ({"bbox_mode": None}, "bbox_mode must be XYXY_ABS or XYWH_ABS"),
        ({"category_id": 2}, r"category_id must be an index into thing_classes in \[0, 2\), got 2"),
        ({"category_id": -1}, "category_id must be"),
        ({"category_id": "cat"}, "category_id must be .* got 'cat'"),
    ],
)
def test_annotation_that_is_not_of_the_standard_format_is_refused(
    change, message, register, entries
):
    name = register(entries([BOX | change]), thing_classes=CLASSES)
    with pytest.raises(InputError, match=f"image_0.png: .*{message}"):
        catalog.read_catalog([name])


def test_every_problem_is_told_and_what_is_left_can_be_read(register, entries):
    reaching, flat = BOX | {"bbox": [1, 1, 30, 9]}, BOX | {"bbox": [3, 3, 3, 9]}
    wrong = [BOX | {"bbox": [1]}, BOX | {"bbox_mode": 9}, BOX | {"category_id": 7}]
    found = entries([BOX, reaching, flat, *wrong, BOX], [BOX], [BOX], [BOX])
    found[1]["image_id"], found[2]["image_id"], found[3]["file_name"] = 1.5, 0, None
    problems = []
    dataset = catalog.read_catalog(
        [register(found, thing_classes=CLASSES)],
        on_problem=lambda kind, error: problems.append((kind, str(error))),
    )
    expected = [
        ("image entries", "entry 3 has no file_name"),
        ("boxes that reach out of their image", "annotations[1]: box from (1, 1) to (30, 9)"),
        ("boxes without area", "annotations[2]: box from (3, 3) to (3, 9)"),
        ("annotations", "annotations[3]: bbox must be 4 finite numbers"),
        ("annotations", "annotations[4]: bbox_mode must be"),
        ("annotations", "annotations[5]: category_id must be"),
        ("image entries", "image_id must be an integer or text, got 1.5"),
        ("image entries", "two images have the id 0"),
    ]
    assert [kind for kind, _ in problems] == [kind for kind, _ in expected]
    for (_, message), (_, part) in zip(problems, expected, strict=True):
        assert part in message and "\n" not in message
    assert dataset[0].boxes.tolist() == [[1, 2, 5, 6], [1, 1, 20, 9], [1, 2, 5, 6]]
    assert len(dataset) == 1


def test_a_set_that_cannot_be_read_hides_no_problem_of_the_others(register, entries, shapes):
    problems = []
    name = register(entries([BOX | {"bbox": None}], name="val"), thing_classes=CLASSES)
    sets = ("DATASETS.TRAIN", ["nowhere"], "DATASETS.TEST", [name], "SSOD.DATA.UNLABELED", ["far"])
    cfg = tiny_config(shapes, "unused", *NO_FILES, *sets)
    found, _ = catalog.read_sets(cfg, lambda kind, error: problems.append(str(error)))
    assert (found.labeled, found.unlabeled, len(found.val)) == (None, None, 1)
    for problem, part in zip(
        problems, ("nowhere: not in", "far: not in", "bbox must"), strict=True
    ):
        assert part in problem


def test_ids_stay_unique_in_several_sets(register, entries):
    names = [register(entries([BOX], [], name=n), thing_classes=CLASSES) for n in "ab"]
    found = catalog.read_catalog(names)
    assert found.image_ids == [f"{name}/{i}" for name in names for i in (0, 1)]
    assert found.class_counts.tolist() == [0, 2]
    with pytest.raises(InputError, match="two images have the id .*; make ids unique"):
        catalog.read_catalog([names[0], names[0]])
    twice = register(entries([BOX], image_id=5) * 2, thing_classes=CLASSES)
    with pytest.raises(InputError, match="two images have the id 5"):
        catalog.read_catalog([twice])


def test_file_is_the_id_where_there_is_none(register, entries):
    found = entries([BOX])
    del found[0]["image_id"]
    assert catalog.read_catalog([register(found, thing_classes=CLASSES)]).image_ids == [
        found[0]["file_name"]
    ]


def test_sets_that_are_used_together_have_the_same_classes(register, entries):
    one = register(entries([BOX]), thing_classes=CLASSES)
    other = register(entries([BOX]), thing_classes=CLASSES[::-1])
    without = register(entries([BOX]))
    with pytest.raises(InputError, match=f"{other}: its thing_classes differ from those of {one};"):
        catalog.read_catalog([one, other])
    with pytest.raises(InputError, match=f"{without}: its thing_classes are missing; set them in"):
        catalog.read_catalog([without])


def test_unknown_name_is_told_with_those_like_it_and_how_to_register():
    with pytest.raises(InputError, match=r"did you mean coco_2017_train.*register_coco_instances"):
        catalog.read_catalog(["coco_2017_trian"])
    with pytest.raises(InputError, match="^qqq: not in DatasetCatalog; first register it with"):
        catalog.read_catalog(["qqq"])


def test_missing_files_name_the_path_and_where_detectron2_looks(register, entries, tmp_path):
    nowhere = tmp_path / "nowhere"
    name = register(nowhere / "a.json", nowhere)
    hint = "not found; .*environment variable DETECTRON2_DATASETS, here"
    with pytest.raises(InputError, match=f"{name}: {nowhere}/a.json {hint}"):
        catalog.read_catalog([name])
    found = entries([BOX])
    found[0]["file_name"] = f"{nowhere}/a.png"
    with pytest.raises(InputError, match=f"{nowhere} {hint}"):
        catalog.read_catalog([register(found, thing_classes=CLASSES)])
    with pytest.raises(InputError, match="entry 0 has no file_name"):
        catalog.read_catalog([register([{"image_id": 1}], thing_classes=CLASSES)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read; correct its files: Expecting property name"),
        ("[]", "cannot be read; correct its files: annotation file format <class 'list'>"),
    ],
)
def test_damaged_file_is_one_line(text, message, register, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        catalog.read_catalog([register(path, tmp_path)])
    assert "\n" not in str(error.value)


def test_images_without_boxes_are_left_out_before_the_split(load, register, entries):
    crowd = BOX | {"iscrowd": 1}
    found = entries([BOX], [], [crowd], [crowd, BOX], [BOX])
    del found[1]["annotations"]
    name = register(found, thing_classes=CLASSES)
    cfg = ("DATASETS.TRAIN", [name], "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    assert load(*SUPERVISED, *cfg).labeled.image_ids == [0, 3, 4]
    every = load(*SUPERVISED, *cfg, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    assert every.labeled.image_ids == [0, 1, 2, 3, 4]
    split = load(*NO_FILES, *cfg, "SSOD.DATA.PERCENT", 34)
    assert sorted([*split.labeled.image_ids, *split.unlabeled.image_ids]) == [0, 3, 4]
    empty = register(entries([], [crowd]), thing_classes=CLASSES)
    with pytest.raises(InputError, match=f"{empty}: expected images with boxes, found none"):
        load(*SUPERVISED, "DATASETS.TRAIN", [empty])


def test_files_are_not_filtered(load, coco_set, shapes, tmp_path):
    content = json.loads((shapes / "annotations" / "labeled.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]
    path = tmp_path / "labeled.json"
    path.write_text(json.dumps(content))
    for overrides in ((), ("DATASETS.TEST", [coco_set("val")], "SSOD.DATA.VAL_JSON", "")):
        assert len(load("SSOD.DATA.LABELED_JSON", path, *overrides).labeled) == SPEC.num_labeled


def test_percent_splits_the_catalog_as_it_does_files(load, coco_set):
    split = ("SSOD.DATA.PERCENT", 34, "SSOD.DATA.SPLIT_SEED", 3)
    found = load(*NO_FILES, "DATASETS.TRAIN", [coco_set("labeled")], *split)
    expected = load(*NO_UNLABELED, *split)
    for name in ("labeled", "unlabeled", "hidden_truth"):
        _assert_same(getattr(found, name), getattr(expected, name))
    assert set(found.labeled.image_ids) == set(make_split(range(1, 7), 34, 3))
    assert found.val is None


def test_four_sets_of_the_catalog_are_those_of_the_files(load, coco_set):
    found = load(
        *NO_FILES,
        *("DATASETS.TRAIN", [coco_set("labeled")], "DATASETS.TEST", [coco_set("val")]),
        *("SSOD.DATA.UNLABELED", [coco_set("unlabeled_truth")]),
    )
    expected = load()
    for name in ("labeled", "unlabeled", "val", "hidden_truth"):
        _assert_same(getattr(found, name), getattr(expected, name))
    assert found.unlabeled.class_counts.sum() == 0 < found.hidden_truth.class_counts.sum()


@pytest.mark.parametrize("case", ["no classes", "other classes", "no boxes", "one without boxes"])
def test_pseudo_labels_are_measured_only_against_boxes_of_the_same_classes(
    case, load, register, entries
):
    labeled = register(entries([BOX]), thing_classes=CLASSES)
    classes = {"no classes": {}, "other classes": {"thing_classes": ["a", "b"]}}
    found = entries([] if case == "no boxes" else [BOX], name="other")
    before = copy.deepcopy(found)
    names = [register(found, **classes.get(case, {"thing_classes": CLASSES}))]
    if case == "one without boxes":
        names.append(register(entries([], name="third"), thing_classes=CLASSES))
    cfg = ("DATASETS.TRAIN", [labeled], "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    loaded = load(*NO_FILES, *cfg, "SSOD.DATA.UNLABELED", names)
    assert loaded.hidden_truth is None
    assert len(loaded.unlabeled) == len(names)
    assert loaded.unlabeled.class_counts.tolist() == [0, 0]
    assert found == before  # what is registered is not changed


def test_image_that_is_labeled_and_unlabeled_is_refused(load, coco_set):
    sets = ("DATASETS.TRAIN", [coco_set("labeled")], "SSOD.DATA.UNLABELED", [coco_set("labeled")])
    with pytest.raises(InputError, match="6 image files are both labeled and unlabeled"):
        load(*NO_FILES, *sets)


def test_labeled_set_of_the_catalog_with_an_index_of_images(load, coco_set, shapes, tmp_path):
    images = [(f"unlabeled_{i + 1:06d}.jpg", 48, 64) for i in range(SPEC.num_unlabeled)]
    write_index(tmp_path / "index.tsv", str(shapes / "images"), images)
    train = ("DATASETS.TRAIN", [coco_set("labeled")])
    found = load(*NO_FILES, *train, "SSOD.DATA.UNLABELED_INDEX", tmp_path / "index.tsv")
    assert found.unlabeled.image_ids == [name for name, _, _ in images]
    assert found.unlabeled.file_names == load().unlabeled.file_names


@pytest.mark.parametrize("image_id", [None, 1.5, (1, 2)])
def test_ids_are_integers_or_text(image_id, register, entries):
    found = register(entries([BOX], image_id=image_id), thing_classes=CLASSES)
    with pytest.raises(InputError, match=f"{found}: image_id must be an integer or text, got "):
        catalog.read_catalog([found])


def test_labeled_set_of_the_catalog_with_a_folder_of_images(load, coco_set, shapes, tmp_path):
    for path in (shapes / "images").glob("unlabeled_*.jpg"):
        shutil.copy(path, tmp_path)
    train = ("DATASETS.TRAIN", [coco_set("labeled")])
    found = load(*NO_FILES, *train, "SSOD.DATA.UNLABELED_IMAGES", tmp_path)
    assert len(found.unlabeled) == SPEC.num_unlabeled and found.hidden_truth is None
    files = load("SSOD.DATA.LABELED_JSON", "", "SSOD.DATA.LABELED_IMAGES", "", *train)
    for name in ("unlabeled", "val", "hidden_truth"):
        _assert_same(getattr(files, name), getattr(load(), name))


def test_only_names_of_classes_have_to_agree_between_catalog_and_files(load, register, shapes):
    labeled = read_coco(shapes / "annotations" / "labeled.json", shapes / "images")
    one = labeled[0]
    entry = {"file_name": one.file_name, "height": one.height, "width": one.width, "image_id": "a"}
    boxes = [BOX | {"bbox": box, "category_id": 0} for box in one.boxes.tolist()]
    name = register([entry | {"annotations": boxes}], thing_classes=labeled.class_names)
    found = load("SSOD.DATA.LABELED_JSON", "", "DATASETS.TRAIN", [name])
    assert found.labeled.category_ids == found.val.category_ids == [0, 1, 2, 3, 4, 5]
    other = register([entry | {"annotations": boxes}], thing_classes=labeled.class_names[::-1])
    with pytest.raises(InputError, match=f"val.json: its categories differ from those of {other}"):
        load(*NO_UNLABELED, "SSOD.DATA.LABELED_JSON", "", "DATASETS.TRAIN", [other])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("DATASETS.TRAIN", ["a"]), "DATASETS.TRAIN and SSOD.DATA.LABELED_JSON both name labeled"),
        (("DATASETS.TEST", ["a"]), "DATASETS.TEST and SSOD.DATA.VAL_JSON both name validation"),
        (
            (*NO_FILES, "DATASETS.TRAIN", ["a"], *("SSOD.DATA.UNLABELED", ["b"]))
            + ("SSOD.DATA.UNLABELED_IMAGES", "c"),
            "UNLABELED and SSOD.DATA.UNLABELED_IMAGES both name unlabeled images",
        ),
        (
            (*NO_FILES, "DATASETS.TRAIN", ["a"], *("SSOD.DATA.UNLABELED", ["b"]))
            + ("SSOD.DATA.UNLABELED_INDEX", "c"),
            "UNLABELED and SSOD.DATA.UNLABELED_INDEX both name unlabeled images",
        ),
        ((*NO_UNLABELED, "SSOD.DATA.UNLABELED", ["a"]), "SSOD.DATA.UNLABELED needs DATASETS.TRAIN"),
        (NO_FILES, "no labeled images: set DATASETS.TRAIN to .* or SSOD.DATA.LABELED_JSON to"),
        ((*NO_FILES, "DATASETS.TRAIN", ["nowhere"]), "nowhere: not in DatasetCatalog"),
    ],
)
def test_sources_that_do_not_fit_are_refused(overrides, message, load):
    with pytest.raises(InputError, match=message):
        load(*overrides)


def test_percent_and_unlabeled_sets_exclude_each_other(load, coco_set):
    sets = ("DATASETS.TRAIN", [coco_set("labeled")], "SSOD.DATA.UNLABELED", [coco_set("unlabeled")])
    with pytest.raises(InputError, match="PERCENT splits the labeled set and cannot be combined"):
        load(*NO_FILES, *sets, "SSOD.DATA.PERCENT", 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 0}, r"annotations\[0\] has id 0 .* an id from 1 on, area and iscrowd"),
        ({"area": None}, "area and iscrowd"),
        ({"iscrowd": None}, "area and iscrowd"),
    ],
    ids=["id", "area", "iscrowd"],
)
@pytest.mark.parametrize("source", ["catalog", "file"])
def test_validation_set_that_would_fail_later_is_refused_before_training(
    change, message, source, load, register, shapes, tmp_path
):
    content = json.loads((shapes / "annotations" / "val.json").read_text())
    first = content["annotations"][0] | change
    content["annotations"][0] = {key: v for key, v in first.items() if v is not None}
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    if source == "file":
        overrides = ("SSOD.DATA.VAL_JSON", path)
    else:
        name = register(path, shapes / "images")
        overrides = ("SSOD.DATA.VAL_JSON", "", "DATASETS.TEST", [name])
    with pytest.raises(InputError, match=f"val.json: .*{message}"):
        load(*overrides)


def test_validation_set_without_an_evaluator_is_refused_before_training(
    load, register, entries, shapes
):
    names = read_coco(shapes / "annotations" / "val.json", shapes / "images").class_names
    name = register(entries([BOX]), thing_classes=names, evaluator_type="lvis")
    with pytest.raises(InputError, match=r"must be one of \['coco', 'pascal_voc'\], got 'lvis'"):
        load("SSOD.DATA.VAL_JSON", "", "DATASETS.TEST", [name])


def test_unlabeled_images_of_coco_need_no_annotations(shapes, tmp_path):
    assert catalog.COCO_UNLABELED in DatasetCatalog.list()
    content = json.loads((shapes / "annotations" / "unlabeled.json").read_text())
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps({"images": content["images"]}))
    found = catalog._load_unlabeled(str(path), str(shapes / "images"))
    assert [entry["image_id"] for entry in found] == [i["id"] for i in content["images"]]
    assert all(entry["annotations"] == [] for entry in found)


def test_missing_unlabeled_images_of_coco_name_the_expected_path(monkeypatch, tmp_path):
    monkeypatch.delitem(DatasetCatalog.data, catalog.COCO_UNLABELED)  # puts it back afterwards
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    catalog._register_coco_unlabeled()
    with pytest.raises(InputError) as error:
        catalog.read_catalog([catalog.COCO_UNLABELED])
    path = tmp_path / "coco" / "annotations" / "image_info_unlabeled2017.json"
    assert str(error.value).startswith(
        f"{catalog.COCO_UNLABELED}: {path} not found; Detectron2's own"
    )
    assert str(error.value).endswith(f"DETECTRON2_DATASETS, here {str(tmp_path)!r}")
