"""Pascal VOC files of `SSOD.DATA` on this host."""

import numpy as np
import pytest
from detectron2.data.datasets.pascal_voc import load_voc_instances

from ssod.cli.main import main
from ssod.data import build
from ssod.data.datasets import read_coco, read_voc
from ssod.errors import InputError
from ssod.hosts.detectron2.catalog import load_run_data
from ssod.hosts.detectron2.evaluators import test_dataset_names as dataset_names
from ssod.hosts.detectron2.run import Run
from ssod.hosts.metric_log import read_metrics
from tiny_detectron2 import tiny_config
from tiny_run import MAX_ITER
from voc_files import write_voc


@pytest.fixture
def val(shapes):
    return read_coco(shapes / "annotations" / "val.json", shapes / "images")


def test_boxes_are_those_that_detectron2_reads(shapes, val, tmp_path):
    write_voc(tmp_path / "Annotations", val)
    (tmp_path / "JPEGImages").symlink_to(shapes / "images")
    names = tmp_path / "ImageSets" / "Main" / "val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("\n".join(f"val_{index:06d}" for index in range(1, len(val) + 1)))
    dataset = read_voc(names, tmp_path / "JPEGImages", like=val)
    expected = load_voc_instances(str(tmp_path), "val", val.class_names)
    assert len(dataset) == len(expected) > 0
    for index, entry in enumerate(expected):
        record = dataset[index]
        boxes = [annotation["bbox"] for annotation in entry["annotations"]]
        np.testing.assert_array_equal(record.boxes, np.array(boxes, np.float32).reshape(-1, 4))
        classes = [annotation["category_id"] for annotation in entry["annotations"]]
        assert record.classes.tolist() == classes
        assert (record.image_id, record.file_name) == (entry["image_id"], entry["file_name"])


def test_run_trains_and_evaluates_and_its_data_are_checked(shapes, val, tmp_path, capsys):
    folder = write_voc(tmp_path / "voc", val)
    config = tmp_path / "mine.yaml"
    config.write_text("SSOD: {HOST: detectron2}")
    for path in (shapes / "images").glob("val_*.jpg"):
        (tmp_path / "voc" / path.name).write_bytes(path.read_bytes())
    keys = []
    for group, images in (("LABELED", folder), ("VAL", shapes / "images")):
        keys += [f"SSOD.DATA.{group}_JSON", "", f"SSOD.DATA.{group}_VOC", folder]
        keys += [f"SSOD.DATA.{group}_IMAGES", images]
    keys += ["MODEL.ROI_HEADS.NUM_CLASSES", int((val.class_counts > 0).sum())]
    keys += ["SSOD.DATA.UNLABELED_TRUTH_JSON", ""]
    cfg = tiny_config(shapes, tmp_path / "run", *keys)
    run = Run(cfg)
    run.train()
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["iteration"] == MAX_ITER - 1
    results = run.evaluate()
    assert {f"AP-{name}" for name in run.data.val.class_names} <= results["teacher"]["bbox"].keys()
    assert dataset_names(cfg) == dataset_names(cfg)

    unlabeled = ["SSOD.DATA.UNLABELED_IMAGES", str(shapes / "images")]
    unlabeled += ["SSOD.DATA.UNLABELED_JSON", str(shapes / "annotations" / "unlabeled.json")]
    options = [*map(str, keys), *unlabeled, "DATALOADER.NUM_WORKERS", "0"]
    assert main(["check-data", "--config-file", str(config), *options]) == 1
    # The validation images are the labeled ones here, which nothing else could tell.
    assert f"images in two sets: {len(val)}" in capsys.readouterr().out


def test_files_are_read_once_before_a_training(shapes, val, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        build,
        "read_voc",
        lambda path, *args, **kw: read.append(path) or read_voc(path, *args, **kw),
    )
    folder = write_voc(tmp_path / "voc", val)
    labeled = write_voc(tmp_path / "labeled", val)
    for path in (shapes / "images").glob("val_*.jpg"):
        (labeled / path.name).write_bytes(path.read_bytes())
    keys = []
    for group, files, images in (("LABELED", labeled, labeled), ("VAL", folder, shapes / "images")):
        keys += [f"SSOD.DATA.{group}_JSON", "", f"SSOD.DATA.{group}_VOC", files]
        keys += [f"SSOD.DATA.{group}_IMAGES", images]
    keys += ["MODEL.ROI_HEADS.NUM_CLASSES", int((val.class_counts > 0).sum())]
    cfg = tiny_config(shapes, "unused", *keys, "SSOD.DATA.UNLABELED_TRUTH_JSON", "")
    load_run_data(cfg)
    assert dataset_names(cfg)[0].startswith("voc:")
    assert read == [str(labeled), str(folder)]


def test_set_that_does_not_fit_is_refused(shapes, val, tmp_path):
    folder = write_voc(tmp_path / "voc", val)
    keys = ("SSOD.DATA.VAL_VOC", folder)
    with pytest.raises(InputError, match="VAL_JSON and SSOD.DATA.VAL_VOC both name images"):
        dataset_names(tiny_config(shapes, "unused", *keys))
    keys += ("SSOD.DATA.VAL_JSON", "", "SSOD.DATA.LABELED_JSON", "", "DATASETS.TRAIN", ["a"])
    with pytest.raises(InputError, match="VAL_VOC needs labeled images in SSOD.DATA"):
        dataset_names(tiny_config(shapes, "unused", *keys))
