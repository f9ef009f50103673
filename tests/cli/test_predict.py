import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from ssod.cli.main import main
from ssod.hosts.torchvision.run import CHECKPOINT_NAME

ROTATED = 6  # Exif: to be turned by 90 degrees clockwise


@pytest.fixture
def predict(first_run, tmp_path):
    """Predict with the finished run; returns the status and the file that was written."""

    def run(*args, weights=first_run):
        output = tmp_path / "out"
        status = main(
            ["predict", *map(str, args), "--weights", str(weights), "--output", str(output)]
        )
        written = output / "predictions.json"
        return status, json.loads(written.read_text()) if written.exists() else None

    return run


@pytest.fixture
def photo(tmp_path, shapes):
    """Copy a validation image to paths."""
    source = sorted((shapes / "images").glob("val_*"))[0]

    def copy(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(source).save(path)

    return copy


def _results(written):
    """Boxes and scores by file and category."""
    files = {image["id"]: image["file_name"] for image in written["images"]}
    return sorted(
        (files[a["image_id"]], a["category_id"], a["score"], a["bbox"])
        for a in written["annotations"]
    )


@pytest.mark.parametrize(("model", "args"), [("teacher", []), ("student", ["--student"])])
def test_predictions_are_those_of_the_evaluation(predict, first_run, shapes, model, args):
    file = first_run / "inference" / f"coco_instances_results_{model}.json"
    evaluated = json.loads(file.read_text())
    thresh = float(np.median([result["score"] for result in evaluated]))
    truth = json.loads((shapes / "annotations" / "val.json").read_text())
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    images = [shapes / "images" / name for name in names.values()]
    status, written = predict(*images, "--score-thresh", thresh, *args)
    assert status == 0
    expected = sorted(
        (names[r["image_id"]], r["category_id"], r["score"], r["bbox"])
        for r in evaluated
        if r["score"] >= thresh
    )
    assert 0 < len(expected) < len(evaluated)
    assert _results(written) == expected
    assert written["categories"] == [
        {"id": c["id"], "name": c["name"]} for c in truth["categories"]
    ]
    assert [i["file_name"] for i in written["images"]] == list(names.values())


def test_pycocotools_reads_the_file_and_its_annotations_as_results(predict, shapes, tmp_path):
    _, written = predict(shapes / "images", "--score-thresh", 0, "--no-images")
    coco = COCO(str(tmp_path / "out" / "predictions.json"))
    results = coco.loadRes(written["annotations"])
    assert len(results.anns) == len(coco.anns) == len(written["annotations"]) > 0
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in written["annotations"])
    assert not (tmp_path / "out" / "images").exists()


def test_names_keep_their_tree(predict, photo, tmp_path, capsys):
    names = ["a/x.png", "b/x.png", "b/deep er/ä ö.PNG", "c/y.tiff", "c/z.webp"]
    photo(*names, "b/.hidden/x.png")
    paths = [tmp_path / "a" / "x.png", tmp_path / "b", tmp_path / "b" / "x.png", tmp_path / "c"]
    status, written = predict(*paths, "--score-thresh", 0)
    assert status == 0
    found = [image["file_name"] for image in written["images"]]
    assert found == ["a/x.png", "b/deep er/ä ö.PNG", "b/x.png", "c/y.tiff", "c/z.webp"]
    drawn = tmp_path / "out" / "images"
    assert sorted(p.relative_to(drawn).as_posix() for p in drawn.rglob("*.*")) == found
    assert {Image.open(drawn / name).format for name in names} == {"PNG", "TIFF", "WEBP"}
    printed = capsys.readouterr().out
    assert f"found {len(written['annotations'])} boxes in 5 images" in printed


def test_boxes_are_in_pixels_of_the_upright_image(predict, tmp_path, shapes):
    image = Image.open(sorted((shapes / "images").glob("val_*"))[0]).crop((0, 0, 60, 40))
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    turned = image.transpose(Image.Transpose.ROTATE_90)  # counter-clockwise
    turned.save(tmp_path / "in" / "turned.png", exif=exif)
    _, written = predict(tmp_path / "in", "--score-thresh", 0)
    sizes = {i["file_name"]: (i["height"], i["width"]) for i in written["images"]}
    assert sizes == {"turned.png": (40, 60), "upright.png": (40, 60)}
    by_file = {name: [r[1:] for r in _results(written) if r[0] == name] for name in sizes}
    assert by_file["turned.png"] == by_file["upright.png"] != []
    drawn = [np.asarray(Image.open(tmp_path / "out" / "images" / name)) for name in sizes]
    np.testing.assert_array_equal(*drawn)


def test_nothing_found(predict, photo, tmp_path):
    photo("x.png")
    status, written = predict(tmp_path / "x.png", "--score-thresh", 1)
    assert status == 0
    assert len(written["images"]) == 1 and written["annotations"] == []
    drawn = Image.open(tmp_path / "out" / "images" / "x.png")
    original = Image.open(tmp_path / "x.png").convert("RGB")
    assert max(drawn.size) >= 400  # enlarged, so that labels would fit
    small = np.asarray(drawn.resize(original.size, Image.Resampling.BOX), float)
    assert np.abs(small - np.asarray(original)).mean() < 5


def test_broken_images_are_left_out_and_told(predict, photo, tmp_path, caplog, capsys):
    photo("in/a.png", "in/b.png", "in/c.png", "in/d.png")
    os.truncate(tmp_path / "in" / "b.png", 200)  # its header is whole
    (tmp_path / "in" / "c.png").write_bytes(b"no image")
    status, written = predict(tmp_path / "in")
    assert status == 2
    assert [image["file_name"] for image in written["images"]] == ["a.png", "d.png"]
    warned = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(warned) == 2 and "c.png" in warned[0] and "b.png" in warned[1]
    assert "error: 2 images cannot be decoded" in capsys.readouterr().err


def test_checkpoint_without_class_names(predict, photo, first_run, tmp_path, caplog):
    run = tmp_path / "older"
    run.mkdir()
    shutil.copy(first_run / "config.yaml", run)
    state = torch.load(first_run / CHECKPOINT_NAME, weights_only=True)
    del state["categories"]
    torch.save(state, run / CHECKPOINT_NAME)
    photo("x.png")
    status, written = predict(tmp_path / "x.png", weights=run / CHECKPOINT_NAME)
    assert status == 0
    assert written["categories"][3] == {"id": 3, "name": "class 3"}
    assert sum("no class names" in r.getMessage() for r in caplog.records) == 1


def test_student_stands_in_for_a_teacher_that_has_not_started(
    predict, photo, first_run, tmp_path, capsys
):
    run = tmp_path / "early"
    run.mkdir()
    shutil.copy(first_run / "config.yaml", run)
    state = torch.load(first_run / CHECKPOINT_NAME, weights_only=True)
    state["model"]["_extra_state"] = torch.tensor([1, 0])
    torch.save(state, run / CHECKPOINT_NAME)
    photo("x.png")
    assert predict(tmp_path / "x.png", weights=run)[0] == 0
    assert capsys.readouterr().out.startswith("student of ")


def test_what_is_there_is_kept(predict, photo, tmp_path, capsys):
    photo("x.png", "out/images/x.png")
    before = (tmp_path / "out" / "images" / "x.png").read_bytes()
    status, written = predict(tmp_path / "x.png")
    assert status == 2 and written is None
    assert "already there; remove it or choose another" in capsys.readouterr().err
    assert (tmp_path / "out" / "images" / "x.png").read_bytes() == before


@pytest.mark.parametrize(
    ("images", "options", "parts"),
    [
        ("nowhere", [], ["nowhere: expected a folder or an image", "there is none"]),
        ("notes.txt", [], ["notes.txt: expected", "another file"]),
        ("empty", [], ["empty: expected a folder with images", "it has none"]),
        ("x.png", ["--score-thresh", "1.5"], ["--score-thresh must be in [0, 1], got 1.5"]),
        ("x.png", ["--weights", "no.pth"], ["no.pth: not found", "--weights takes"]),
        ("x.png", ["--weights", "empty"], ["config.yaml: not found", "--config-file"]),
        ("x.png", ["--weights", "configured"], ["checkpoint.pth: checkpoint not found"]),
        ("x.png", ["--config-file", "notes.txt"], ["notes.txt: cannot be read as a YAML"]),
        ("x.png", ["--weights", "other"], ["expected a checkpoint of a run"]),
    ],
)
def test_bad_input_is_one_line(
    images, options, parts, predict, photo, first_run, tmp_path, monkeypatch, capsys
):
    photo("x.png")
    (tmp_path / "notes.txt").write_text("just: [text")
    for folder in ("empty", "configured", "other"):
        (tmp_path / folder).mkdir()
    for folder in ("configured", "other"):
        shutil.copy(first_run / "config.yaml", tmp_path / folder)
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "other" / CHECKPOINT_NAME)
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", images, "--weights", str(first_run), "--output", "out", *options]
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and "Traceback" not in "".join(errors)
    assert all(part in errors[-1] for part in parts), errors[-1]
    assert not (tmp_path / "out").exists()
