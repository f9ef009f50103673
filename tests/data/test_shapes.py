import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ssod.data.shapes import (
    CATEGORY_IDS,
    MANIFEST,
    ShapesSpec,
    ensure_shapes,
    shapes_scene,
    write_shapes,
)
from ssod.data.shapes_scene import CLASS_NAMES, CROWDED_NAMES
from ssod.errors import InputError

SMALL = ShapesSpec(num_labeled=3, num_unlabeled=4, num_val=2, seed=7)


def _files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, SMALL)
    return root


@pytest.fixture(scope="module")
def scenes():
    return [shapes_scene(ShapesSpec(), "val", index) for index in range(100)]


@pytest.fixture(scope="module")
def crowded_scenes():
    return [shapes_scene(ShapesSpec(crowded=True), "val", index) for index in range(60)]


def _load(root, name):
    return json.loads((root / "annotations" / f"{name}.json").read_text())


def test_two_runs_are_byte_identical(small_set, tmp_path):
    write_shapes(tmp_path, SMALL)
    assert _files(tmp_path) == _files(small_set)


def test_images_do_not_depend_on_the_counts(small_set, tmp_path):
    write_shapes(tmp_path, ShapesSpec(num_labeled=1, num_unlabeled=1, num_val=1, seed=7))
    small, fewer = _files(small_set), _files(tmp_path)
    images = [path for path in fewer if path.suffix == ".jpg"]
    assert len(images) == 3
    assert all(fewer[path] == small[path] for path in images)


def test_seeds_and_splits_give_different_images():
    keys = [(0, "labeled"), (1, "labeled"), (0, "unlabeled"), (0, "val")]
    images = {shapes_scene(ShapesSpec(seed=s), split, 0).image.tobytes() for s, split in keys}
    assert len(images) == len(keys)


def test_unlabeled_file_holds_no_truth(small_set):
    unlabeled, truth = _load(small_set, "unlabeled"), _load(small_set, "unlabeled_truth")
    assert unlabeled["annotations"] == []
    assert unlabeled["images"] == truth["images"]
    assert {a["image_id"] for a in truth["annotations"]} == {i["id"] for i in truth["images"]}
    assert set(unlabeled["images"][0]) == {"id", "file_name", "width", "height"}


@pytest.mark.parametrize("name, split", [("labeled", "labeled"), ("unlabeled_truth", "unlabeled")])
def test_annotations_match_the_masks(small_set, name, split):
    annotations = defaultdict(list)
    for annotation in _load(small_set, name)["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    for image_id, of_image in annotations.items():
        scene = shapes_scene(SMALL, split, image_id - 1)
        assert [a["category_id"] for a in of_image] == [CATEGORY_IDS[c] for c in scene.classes]
        for annotation, mask in zip(of_image, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            assert annotation["area"] == len(rows)


def test_foreign_objects_are_all_that_max_foreign_adds(tmp_path, small_set):
    spec = replace(SMALL, num_unlabeled=20, max_foreign=3)
    write_shapes(tmp_path / "foreign", spec)
    write_shapes(tmp_path / "none", replace(spec, max_foreign=0))
    foreign, none = _files(tmp_path / "foreign"), _files(tmp_path / "none")
    changed = {path.name for path in foreign if foreign[path] != none[path]}
    scenes = [shapes_scene(spec, "unlabeled", index) for index in range(20)]
    with_foreign = {f"unlabeled_{i + 1:06d}.jpg" for i in range(20) if len(scenes[i].foreign)}
    assert 0 < len(with_foreign) < 20
    assert changed == with_foreign | {MANIFEST, "unlabeled_truth.json"}
    # They hide parts of others, and nothing else in the truth changes.
    after, before = (_load(tmp_path / n, "unlabeled_truth") for n in ("foreign", "none"))
    for a, b in zip(after["annotations"], before["annotations"], strict=True):
        assert {k: a[k] for k in a if k not in ("area", "bbox")}.items() <= b.items()
        assert 0.5 * b["area"] < a["area"] <= b["area"]
    assert after["categories"] == before["categories"] == _load(small_set, "val")["categories"]


def test_foreign_objects_are_in_unlabeled_images_only():
    spec = ShapesSpec(max_foreign=4)
    for split in ("labeled", "val"):
        for index in range(10):
            scene, plain = (shapes_scene(s, split, index) for s in (spec, ShapesSpec()))
            assert not len(scene.foreign) and (scene.image == plain.image).all()


def test_foreign_objects_differ_from_what_they_lie_on():
    spec = ShapesSpec(max_foreign=4)
    scenes = [shapes_scene(spec, "unlabeled", index) for index in range(40)]
    counts = [len(scene.foreign) for scene in scenes]
    assert min(counts) == 0 and max(counts) <= 4 and 1 < np.mean(counts) < 2
    contrasts = []
    for index, scene in enumerate(scenes):
        objects = np.concatenate([scene.masks, scene.foreign])
        assert objects.sum(0).max() == 1
        plain = shapes_scene(ShapesSpec(), "unlabeled", index)
        for mask in scene.foreign:
            difference = scene.image[mask].astype(int) - plain.image[mask]
            contrasts.append(np.abs(difference).mean(0).max())
    assert np.mean(np.array(contrasts) > 20) > 0.9


def test_loads_in_pycocotools(small_set, capsys):
    for name in ("labeled", "unlabeled", "unlabeled_truth", "val"):
        coco = COCO(small_set / "annotations" / f"{name}.json")
        assert sorted(coco.getCatIds()) == sorted(CATEGORY_IDS[: len(CLASS_NAMES)])
        assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
        for info in coco.imgs.values():
            with Image.open(small_set / "images" / info["file_name"]) as image:
                assert image.size == (info["width"], info["height"])
                assert image.mode == "RGB"


def test_masks_are_disjoint_and_boxes_inside_the_image(scenes):
    for scene in scenes:
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.classes), *scene.image.shape[:2])
        assert scene.masks.sum(0).max() == 1
        assert len(scene.classes) <= ShapesSpec().max_objects


def test_objects_differ_from_what_surrounds_them(scenes):
    # Mean color of an object against that of the rest: the masks are where the shapes are.
    contrasts = [
        np.abs(scene.image[mask].mean(0) - scene.image[~scene.masks.any(0)].mean(0)).max()
        for scene in scenes
        for mask in scene.masks
        if not scene.masks.any(0).all()
    ]
    assert np.mean(np.array(contrasts) > 20) > 0.9


def test_every_size_band_is_well_filled(scenes):
    areas = np.concatenate([scene.masks.sum((1, 2)) for scene in scenes])
    shares = np.histogram(areas, [0, 32**2, 96**2, np.inf])[0] / len(areas)
    assert (shares > (0.2, 0.4, 0.04)).all()


def test_class_frequencies_have_a_long_tail(scenes):
    counts = Counter(int(c) for scene in scenes for c in scene.classes)
    head, middle, tail = ([counts[i], counts[i + 1]] for i in (0, 2, 4))
    assert sum(head) > sum(middle) > sum(tail)
    assert min(counts[c] for c in range(len(CLASS_NAMES))) > 0
    assert counts[0] > 4 * counts[5]


def test_default_labeled_split_has_every_class():
    spec = ShapesSpec()
    scenes = [shapes_scene(spec, "labeled", index) for index in range(spec.num_labeled)]
    assert {int(c) for scene in scenes for c in scene.classes} == set(range(len(CLASS_NAMES)))


def _bands_and_classes(scenes, num_bands):
    """Band of hues nearest to the mean hue of each object, and its class."""
    for scene in scenes:
        hue = np.asarray(Image.fromarray(scene.image).convert("HSV"))[..., 0] / 255
        for mask, label in zip(scene.masks, scene.classes, strict=True):
            mean = np.angle(np.exp(2j * np.pi * hue[mask]).mean()) / (2 * np.pi)
            yield round(mean * num_bands) % num_bands, int(label)


def test_hue_is_a_cheap_cue(scenes):
    hits = [band == label for band, label in _bands_and_classes(scenes, len(CLASS_NAMES))]
    assert np.mean(hits) > 0.9


def test_default_images_are_those_of_version_1():
    # Change this hash together with _VERSION only.
    digest = hashlib.sha256()
    for spec in (ShapesSpec(), ShapesSpec(max_foreign=3)):
        for split in ("labeled", "unlabeled", "val"):
            for index in range(4):
                scene = shapes_scene(spec, split, index)
                digest.update(scene.image.tobytes() + scene.classes.tobytes())
    assert digest.hexdigest()[:16] == "1eec389a762c64f1"
    assert "crowded" not in ShapesSpec().to_dict() and ShapesSpec().to_dict()["max_objects"] == 4


def test_crowded_scenes_hold_more_and_smaller_objects(scenes, crowded_scenes):
    def objects(scenes):
        return [len(scene.classes) for scene in scenes]

    def areas(scenes):
        return np.concatenate([scene.masks.sum((1, 2)) for scene in scenes])

    assert 4 < max(objects(crowded_scenes)) <= 13 == ShapesSpec(crowded=True).max_objects
    assert min(objects(crowded_scenes)) == 1
    assert np.mean(objects(crowded_scenes)) > 2 * np.mean(objects(scenes))
    crowded = areas(crowded_scenes)
    shares = np.histogram(crowded, [0, 32**2, 96**2, np.inf])[0] / len(crowded)
    assert (shares > (0.5, 0.3, 0.005)).all()
    assert np.median(crowded) < np.median(areas(scenes))
    assert crowded.min() > 9**2  # 0.6 of 14 x 14: still has an outline


def test_in_crowded_scenes_each_hue_is_of_three_classes(crowded_scenes):
    found = list(_bands_and_classes(crowded_scenes, 4))
    assert np.mean([label % 4 == band for band, label in found]) > 0.85
    classes = {band: {label for b, label in found if b == band} for band in range(4)}
    assert all({band, band + 4, band + 8} <= classes[band] for band in range(4))


def test_crowded_set_on_disk(tmp_path):
    spec = replace(SMALL, crowded=True, max_objects=None)
    write_shapes(tmp_path, spec)
    val = _load(tmp_path, "val")
    assert [c["name"] for c in val["categories"]] == list(CROWDED_NAMES)
    assert [c["id"] for c in val["categories"]] == list(CATEGORY_IDS)
    scene = shapes_scene(spec, "val", 1)
    second = [a for a in val["annotations"] if a["image_id"] == 2]
    assert [a["category_id"] for a in second] == [CATEGORY_IDS[c] for c in scene.classes]
    assert not ensure_shapes(tmp_path, spec)
    assert ensure_shapes(tmp_path, SMALL)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_crowded_labeled_split_has_every_class_and_a_long_tail(seed):
    spec = ShapesSpec(crowded=True, seed=seed)
    scenes = [shapes_scene(spec, "labeled", index) for index in range(spec.num_labeled)]
    counts = np.bincount(np.concatenate([s.classes for s in scenes]), minlength=12)
    assert len(counts) == 12 and counts.min() > 0
    assert counts[:4].sum() > 2 * counts[-4:].sum()


@pytest.mark.parametrize("image_size", [64, 320])
def test_other_image_sizes(image_size):
    scene = shapes_scene(ShapesSpec(image_size=image_size), "val", 0)
    assert max(scene.image.shape) == image_size
    assert scene.masks.any((1, 2)).all()


def test_progress_counts_every_image(tmp_path):
    calls = []
    write_shapes(tmp_path, SMALL, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 9) for done in range(1, 10)]


def test_existing_set_is_reused_and_another_spec_replaces_it(tmp_path):
    root = tmp_path / "new" / "shapes"
    assert ensure_shapes(root, SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not ensure_shapes(root, SMALL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    assert ensure_shapes(root, ShapesSpec(num_labeled=1, num_unlabeled=1, num_val=1))
    assert len(list((root / "images").iterdir())) == 3


def test_interrupted_set_is_made_again(small_set, tmp_path):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path, SMALL, progress=interrupt)
    assert ensure_shapes(tmp_path, SMALL)
    assert _files(tmp_path) == _files(small_set)


@pytest.mark.parametrize("manifest", [None, "{}", "[1]", "not json"])
def test_foreign_directory_is_left_alone(tmp_path, manifest):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "labeled_000001.jpg").write_text("a photo")
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    before = _files(tmp_path)
    with pytest.raises(InputError, match="holds files but no Shapes set"):
        ensure_shapes(tmp_path, SMALL)
    assert _files(tmp_path) == before


def test_other_files_in_a_shapes_set_survive_a_remake(tmp_path):
    write_shapes(tmp_path, SMALL)
    (tmp_path / "notes.txt").write_text("mine")
    write_shapes(tmp_path, SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "set").write_text("")
    with pytest.raises(InputError, match="needs a directory, but .*set is a file"):
        ensure_shapes(tmp_path / "set", SMALL)


@pytest.mark.parametrize(
    "name, value", [("num_val", 0), ("image_size", 63), ("seed", -1), ("max_foreign", -1)]
)
def test_spec_values_are_checked(name, value):
    with pytest.raises(InputError, match=f"{name} of a Shapes set must be at least"):
        ShapesSpec(**{name: value})


def test_crowded_set_has_no_foreign_objects():
    with pytest.raises(InputError, match="max_foreign of a crowded Shapes set must be 0.* got 2"):
        ShapesSpec(crowded=True, max_foreign=2)
