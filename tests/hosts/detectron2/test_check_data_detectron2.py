"""`ssod check-data` on sets of Detectron2's catalog."""

import json
import shutil

from detectron2.data.datasets import register_coco_instances

from ssod.cli.main import main
from tiny_run import tiny_options


def test_every_problem_of_a_set_is_shown(shapes, tmp_path, capsys):
    root = shutil.copytree(shapes, tmp_path / "copy")
    path = root / "annotations" / "labeled.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][:3]:
        annotation["bbox"] = [1, 1, 0, 5]
    content["annotations"][3]["bbox"] = [0, 0, 5000, 5]
    path.write_text(json.dumps(content))
    name = str(path)
    register_coco_instances(name, {}, name, str(root / "images"))
    config = tmp_path / "mine.yaml"
    config.write_text("SSOD: {HOST: detectron2}")
    options = tiny_options(root, tmp_path / "unused")
    options += ["SSOD.DATA.LABELED_JSON", "", "DATASETS.TRAIN", f"['{name}']"]
    assert main(["check-data", "--config-file", str(config), *options]) == 1
    printed = capsys.readouterr().out
    assert (
        "boxes without area: 3\n" in printed and "boxes that reach out of their image: 1" in printed
    )
    assert printed.count("has no area inside its image") == 3
