import json
import logging
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from ssod.data.build import build_train_loader, load_run_data
from ssod.data.loader import first_samples
from ssod.errors import InputError
from tiny_run import BURN_IN_ITERS, SPEC, differences, tiny_config

NO_UNLABELED = [f"SSOD.DATA.UNLABELED_{end}" for end in ("JSON", "IMAGES", "TRUTH_JSON")]
NO_UNLABELED = [item for key in NO_UNLABELED for item in (key, "")]


@pytest.fixture
def load(shapes):
    """Load the data of the tiny config with overrides."""
    return lambda *overrides: load_run_data(tiny_config(shapes, "unused", *overrides))


@pytest.fixture
def change(shapes, tmp_path):
    """Write an annotation file of the set with some keys replaced; returns the new file."""

    def change(name, **keys):
        content = json.loads((shapes / "annotations" / f"{name}.json").read_text())
        for key, function in keys.items():
            content[key] = [function(entry) for entry in content[key]]
        path = tmp_path / f"changed_{name}.json"
        path.write_text(json.dumps(content))
        return path

    return change


def test_four_sets_are_read(load, caplog):
    caplog.set_level(logging.INFO)
    data = load()
    assert len(data.labeled) == SPEC.num_labeled and data.labeled.class_counts.sum() > 0
    assert len(data.unlabeled) == SPEC.num_unlabeled and data.unlabeled.class_counts.sum() == 0
    assert len(data.val) == SPEC.num_val and data.val.class_counts.sum() > 0
    assert data.hidden_truth.file_names == data.unlabeled.file_names
    assert data.hidden_truth.class_counts.sum() > 0
    (message,) = caplog.messages
    counts = f"6 labeled images with {data.labeled.class_counts.sum()} boxes, 6 unlabeled, 4 for"
    assert message.startswith(counts)


def test_only_the_labeled_set_is_needed_for_supervised_training(load):
    overrides = (*NO_UNLABELED, "SSOD.DATA.VAL_JSON", "", "SSOD.UNSUP_LOSS_WEIGHT", 0)
    data = load(*overrides)
    assert len(data.labeled) == SPEC.num_labeled
    assert (data.unlabeled, data.val, data.hidden_truth) == (None, None, None)


def test_unlabeled_annotations_do_not_leak(load, shapes):
    truth = shapes / "annotations" / "unlabeled_truth.json"
    data = load("SSOD.DATA.UNLABELED_JSON", truth)
    assert len(data.unlabeled) == SPEC.num_unlabeled
    assert data.unlabeled.class_counts.sum() == 0


def test_folder_without_a_json_is_unlabeled(load, shapes, tmp_path):
    for path in (shapes / "images").glob("unlabeled_*.jpg"):
        shutil.copy(path, tmp_path)
    none = ("SSOD.DATA.UNLABELED_JSON", "", "SSOD.DATA.UNLABELED_TRUTH_JSON", "")
    data = load(*none, "SSOD.DATA.UNLABELED_IMAGES", tmp_path)
    assert data.unlabeled.image_ids == [f"unlabeled_{i + 1:06d}.jpg" for i in range(6)]
    assert data.unlabeled.category_ids == data.labeled.category_ids
    assert data.hidden_truth is None


@pytest.mark.parametrize("percent", [20, 50])
def test_percent_splits_the_labeled_set_in_two(load, percent):
    whole = load().labeled
    data = load(*NO_UNLABELED, "SSOD.DATA.PERCENT", percent)
    labeled, unlabeled = data.labeled.image_ids, data.unlabeled.image_ids
    assert len(labeled) == round(percent / 100 * len(whole))
    assert sorted([*labeled, *unlabeled]) == whole.image_ids
    assert set(labeled).isdisjoint(unlabeled)


def test_boxes_of_unlabeled_images_reach_neither_set_nor_samples(tmp_path, shapes):
    """Of a split, whose images have them until then; the hidden truth keeps them."""
    cfg = tiny_config(shapes, tmp_path, *NO_UNLABELED, "SSOD.DATA.PERCENT", 50)
    data = load_run_data(cfg)
    assert data.unlabeled.box_counts.tolist() == [0, 0, 0]
    assert all(len(data.unlabeled[index].boxes) == 0 for index in range(3))
    assert (data.hidden_truth.box_counts > 0).all()
    _, samples = first_samples(build_train_loader(cfg, data, BURN_IN_ITERS), 3)
    assert [(len(s.boxes), len(s.classes)) for s in samples] == [(0, 0)] * 3


def test_boxes_of_unlabeled_images_change_no_batch(tmp_path, shapes):
    cfg = tiny_config(shapes, tmp_path, *NO_UNLABELED, "SSOD.DATA.PERCENT", 50)
    data = load_run_data(cfg)
    with_boxes = replace(data, unlabeled=data.hidden_truth)
    batches = [build_train_loader(cfg, sets, BURN_IN_ITERS) for sets in (data, with_boxes)]
    for one, other in zip(*batches, strict=True):
        assert not differences(asdict(one), asdict(other))


@pytest.mark.parametrize(
    ("is_enabled", "views", "count"),
    [(True, "student", 2), (True, "teacher", 0), (False, "student", 0)],
)
def test_unlabeled_images_have_a_second_strong_view_if_it_is_learned(
    tmp_path, shapes, is_enabled, views, count
):
    keys = ("SSOD.CONTRASTIVE.ENABLED", is_enabled, "SSOD.CONTRASTIVE.VIEWS", views)
    cfg = tiny_config(shapes, tmp_path, *keys)
    for batch in build_train_loader(cfg, load_run_data(cfg), BURN_IN_ITERS):
        assert len(batch.unlabeled.second_strong) == count


def test_hidden_truth_of_a_split_is_what_its_labels_were(load):
    whole = load().labeled
    data = load(*NO_UNLABELED, "SSOD.DATA.PERCENT", 50)
    assert data.hidden_truth.image_ids == data.unlabeled.image_ids
    counts = data.labeled.class_counts + data.hidden_truth.class_counts
    assert counts.tolist() == whole.class_counts.tolist()
    for image_id in data.hidden_truth.image_ids:
        index = data.hidden_truth.image_ids.index(image_id)
        expected = whole[whole.image_ids.index(image_id)]
        np.testing.assert_array_equal(data.hidden_truth[index].boxes, expected.boxes)


def test_split_depends_on_its_own_seed_and_not_on_the_runs(load):
    def split(*overrides):
        overrides = (*NO_UNLABELED, "SSOD.DATA.PERCENT", 50, *overrides)
        return tuple(load(*overrides).labeled.image_ids)

    assert split() == split("SEED", 9)
    assert len({split("SSOD.DATA.SPLIT_SEED", seed) for seed in range(5)}) > 1


def test_invalid_boxes_of_the_labeled_set_are_left_out_on_request(load, change):
    def flatten_first(annotation):
        return annotation | ({"bbox": [1, 1, 0, 5]} if annotation["id"] == 1 else {})

    path = change("labeled", annotations=flatten_first)
    with pytest.raises(InputError, match="no area .*SSOD.DATA.SKIP_INVALID_BOXES True"):
        load("SSOD.DATA.LABELED_JSON", path)
    data = load("SSOD.DATA.LABELED_JSON", path, "SSOD.DATA.SKIP_INVALID_BOXES", True)
    assert data.labeled.class_counts.sum() == load().labeled.class_counts.sum() - 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SSOD.DATA.LABELED_JSON", ""), "LABELED_JSON is empty; name a COCO JSON of labeled"),
        (("SSOD.DATA.LABELED_JSON", "nowhere.json"), "nowhere.json: annotation file not found"),
        (("SSOD.DATA.VAL_IMAGES", "nowhere"), "val.json: 4 of 4 image files are missing"),
        (
            ("MODEL.ROI_HEADS.NUM_CLASSES", 80),
            r"labeled.json: has 6 categories, but .*NUM_CLASSES is 80; set it to 6",
        ),
        (("SSOD.DATA.PERCENT", 10), "cannot be combined with SSOD.DATA.UNLABELED_IMAGES"),
        ((*NO_UNLABELED, "SSOD.DATA.PERCENT", 100), r"PERCENT must be in \(0, 100\), got 100"),
        (("SSOD.DATA.UNLABELED_PER_BATCH", 0), "UNLABELED_PER_BATCH must be at least 1 while"),
        (NO_UNLABELED, "no unlabeled images: set SSOD.DATA.UNLABELED_IMAGES or .*PERCENT, or"),
    ],
    ids=[
        "empty",
        "missing",
        "no images",
        "num_classes",
        "two sources",
        "percent",
        "no batch",
        "none",
    ],
)
def test_config_that_does_not_fit_is_refused(load, overrides, message):
    with pytest.raises(InputError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("key", "name"), [("VAL", "val"), ("UNLABELED_TRUTH", "unlabeled_truth")], ids=["val", "truth"]
)
@pytest.mark.parametrize("what", ["name", "id"])
def test_other_categories_than_the_labeled_sets_are_refused(load, change, key, name, what):
    def rename(category):
        return category | {"name": f"{category['name']}s"}

    def renumber(entry, field="id"):
        return entry | {field: entry[field] + 100}

    if what == "name":
        path = change(name, categories=rename)
    else:
        path = change(
            name, categories=renumber, annotations=lambda entry: renumber(entry, "category_id")
        )
    message = f"changed_{name}.json: its categories differ from those of .*labeled.json"
    with pytest.raises(InputError, match=message):
        load(f"SSOD.DATA.{key}_JSON", path)


def test_image_that_is_labeled_and_unlabeled_is_refused(load, shapes, change):
    def replace_second(image):
        return image | ({"file_name": "labeled_000004.jpg"} if image["id"] == 2 else {})

    path = change("unlabeled", images=replace_second)
    message = "1 image files are both labeled and unlabeled, .*labeled_000004.jpg"
    with pytest.raises(InputError, match=message):
        load("SSOD.DATA.UNLABELED_JSON", path)
    everything = ("SSOD.DATA.UNLABELED_JSON", "", "SSOD.DATA.UNLABELED_TRUTH_JSON", "")
    with pytest.raises(InputError, match="6 image files are both labeled and unlabeled"):
        load(*everything, "SSOD.DATA.UNLABELED_IMAGES", shapes / "images")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "uniform"),
            'INPUT.MIN_SIZE_TRAIN_SAMPLING must be "choice" or "range", got \'uniform\'',
        ),
        (("INPUT.MIN_SIZE_TRAIN", "[48]"), r"smallest and the largest size .*range, got \(48,\)"),
        (("INPUT.MIN_SIZE_TRAIN", "[48, 56, 64]"), r"got \(48, 56, 64\)"),
        (("INPUT.MIN_SIZE_TRAIN", "[64, 48]"), r"got \(64, 48\)"),
        (("INPUT.MIN_SIZE_TRAIN", "[0, 48]"), r"at least 1 pixel, got \(0, 48\)"),
        (
            ("INPUT.MIN_SIZE_TRAIN", "[0]", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"),
            r"at least 1 pixel, got \(0,\)",
        ),
    ],
)
def test_sizes_that_are_no_range_are_refused(tmp_path, shapes, overrides, message):
    cfg = tiny_config(shapes, tmp_path, "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", *overrides)
    with pytest.raises(InputError, match=message) as error:
        build_train_loader(cfg, load_run_data(cfg), 0)
    assert "\n" not in str(error.value)


def test_sizes_of_a_range_are_between_its_ends(tmp_path, shapes):
    keys = ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "[50, 53]")
    cfg = tiny_config(shapes, tmp_path, *keys, "SOLVER.MAX_ITER", 20, "SSOD.BURN_IN_ITERS", 0)
    batches = list(build_train_loader(cfg, load_run_data(cfg), 0))
    views = [v for b in batches for v in (*b.labeled.weak, *b.unlabeled.weak)]
    assert {min(view.shape[1:]) for view in views} == {50, 51, 52, 53}


@pytest.mark.parametrize("key", ["INDEPENDENT", "WARP"])
def test_keys_of_the_views_reach_the_batches(tmp_path, shapes, key):
    cfg = tiny_config(shapes, tmp_path, f"SSOD.VIEWS.{key}", True, "SSOD.LABELED_VIEWS", "both")
    batches = list(build_train_loader(cfg, load_run_data(cfg), BURN_IN_ITERS))
    streams = [views for batch in batches for views in (batch.labeled, batch.unlabeled)]
    for views in streams:
        assert views.to_strong.shape == (2, 3, 3) and views.to_strong.dtype == torch.float64
        assert len(views.erased) == 2 and all(e.shape[1:] == (4,) for e in views.erased)
    shears = [v.to_strong[:, 0, 1].abs().max() for v in streams]
    assert (max(shears) > 1e-3) == (key == "WARP")
    sizes = [a.shape == b.shape for v in streams for a, b in zip(v.weak, v.strong, strict=True)]
    assert all(sizes) == (key == "WARP")


def test_a_weak_view_alone_has_no_geometry_of_its_own(tmp_path, shapes):
    keys = ("SSOD.VIEWS.WARP", True, "SSOD.LABELED_VIEWS", "weak")
    cfg = tiny_config(shapes, tmp_path, *keys)
    for batch in build_train_loader(cfg, load_run_data(cfg), BURN_IN_ITERS):
        assert batch.labeled.to_strong is None and batch.labeled.strong_targets is None
        assert batch.labeled.erased == [] and batch.unlabeled.to_strong is not None
