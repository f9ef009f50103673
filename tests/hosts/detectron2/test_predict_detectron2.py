import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssod.cli.main import main
from ssod.hosts.detectron2.run import Run
from tiny_detectron2 import tiny_config


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """Folder of a finished run; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    cfg = tiny_config(shapes, output)
    Run(cfg).train()
    (output / "config.yaml").write_text(cfg.dump())
    return output


@pytest.mark.parametrize(("model", "args"), [("teacher", []), ("student", ["--student"])])
def test_predictions_are_those_of_the_evaluation(finished, shapes, tmp_path, model, args):
    results = finished / "inference" / model / "coco_instances_results.json"
    evaluated = json.loads(results.read_text())
    truth = json.loads((shapes / "annotations" / "val.json").read_text())
    # Detectron2 evaluates each image alone; others in a batch would change the padding.
    image = truth["images"][0]
    expected = [r for r in evaluated if r["image_id"] == image["id"]]
    thresh = float(np.median([result["score"] for result in expected]))
    expected = sorted((r for r in expected if r["score"] >= thresh), key=lambda r: r["score"])
    command = ["predict", str(shapes / "images" / image["file_name"]), "--weights", str(finished)]
    command += ["--output", str(tmp_path / "out"), "--score-thresh", str(thresh), *args]
    assert main(command) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    found = sorted(written["annotations"], key=lambda a: a["score"])
    assert len(found) == len(expected) > 1
    assert [a["category_id"] for a in found] == [r["category_id"] for r in expected]
    for key in ("bbox", "score"):
        np.testing.assert_allclose(
            [a[key] for a in found], [r[key] for r in expected], rtol=1e-4, atol=1e-4
        )
    assert written["categories"] == [
        {"id": c["id"], "name": c["name"]} for c in truth["categories"]
    ]
    assert (tmp_path / "out" / "images" / image["file_name"]).is_file()


def test_checkpoint_and_config_of_another_place_are_enough(finished, shapes, tmp_path):
    """A single file that a run has left, and its config, whose device is not here."""
    config = tmp_path / "mine.yaml"
    text = (finished / "config.yaml").read_text()
    config.write_text(text.replace("DEVICE: cpu", "DEVICE: cuda:0"))
    checkpoint = (finished / "model_final.pth").rename(tmp_path / "weights.pth")
    try:
        command = ["predict", str(shapes / "images"), "--weights", str(checkpoint), "--no-images"]
        command += ["--config-file", str(config), "--output", str(tmp_path / "out")]
        assert main(command) == 0
    finally:
        checkpoint.rename(finished / "model_final.pth")
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(written["images"]) == len(list((shapes / "images").iterdir()))
    assert (
        torch.load(finished / "model_final.pth", weights_only=True)["categories"]
        == (written["categories"])
    )


def test_views_and_pseudo_boxes_are_drawn(finished, tmp_path, capsys):
    command = ["visualize-data", "--config-file", str(finished / "config.yaml")]
    command += ["--weights", str(finished), "--num-images", "3", "--output", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for name in ("labeled.png", "unlabeled.png"):
        assert f"{tmp_path / name}\n" in printed
        assert np.asarray(Image.open(tmp_path / name)).std() > 10
    assert {"learned", "undecided", "true"} <= set(printed.split())


def test_folder_without_a_checkpoint(finished, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    command = ["predict", str(tmp_path), "--weights", str(tmp_path), "--output", "out"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model_final.pth: checkpoint not found; --weights takes" in error
