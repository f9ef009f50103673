"""Runs on Pascal VOC files."""

import pytest

from ssod.data.datasets import read_coco
from ssod.hosts.torchvision.run import Run
from tiny_run import MAX_ITER, read_lines, resume, tiny_config
from voc_files import write_voc


@pytest.fixture
def write(shapes, tmp_path):
    """Write a COCO file of the Shapes set as VOC files; returns the keys that name them."""

    def write(json_file, group):
        folder = write_voc(tmp_path / group, read_coco(json_file, shapes / "images"))
        return f"SSOD.DATA.{group}_JSON", "", f"SSOD.DATA.{group}_VOC", folder

    return write


def test_run_trains_and_evaluates(shapes, write, tmp_path):
    files = shapes / "annotations"
    # Each class of the validation images must be one of the labeled ones.
    keys = (*write(files / "val.json", "LABELED"), *write(files / "val.json", "VAL"))
    copied = tmp_path / "images"
    copied.mkdir()
    for path in (shapes / "images").glob("val_*.jpg"):
        (copied / path.name).write_bytes(path.read_bytes())
    val = read_coco(files / "val.json", copied)
    names = [val.class_names[label] for label in val.class_counts.nonzero()[0]]
    output = tmp_path / "run"
    cfg = tiny_config(
        *(shapes, output, *keys, "SSOD.DATA.LABELED_IMAGES", copied),
        *("SSOD.DATA.UNLABELED_TRUTH_JSON", "", "MODEL.ROI_HEADS.NUM_CLASSES", len(names)),
    )
    results = Run(cfg).train()
    assert {f"teacher/AP-{name}" for name in names} <= results.keys()
    assert read_lines(output)[-1]["iteration"] == MAX_ITER


def test_metrics_are_those_of_the_same_boxes_in_coco_format(
    finished_run, found_as_truth, shapes, write
):
    def evaluate(*overrides):
        return resume(tiny_config(shapes, finished_run, *overrides)).evaluate()

    expected = evaluate("SSOD.DATA.VAL_JSON", found_as_truth)
    assert expected["student/AP"] > 0
    assert evaluate(*write(found_as_truth, "VAL")) == pytest.approx(expected, rel=1e-4, nan_ok=True)
