"""Positions of Unbiased Teacher's index file in Detectron2's list of images."""

import json

import numpy as np
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets.coco import load_coco_json

from ssod.data.split_files import read_source, read_unbiased_teacher


def test_positions_are_those_of_detectron2s_list(tmp_path):
    rng = np.random.default_rng(0)
    images = [
        {"id": int(i), "file_name": f"{i}.jpg", "height": 9, "width": 9}
        for i in rng.permutation(1000)[:200]
    ]
    annotations = [
        {"image_id": images[i]["id"], "category_id": 1, "bbox": [0, 0, 3, 3], "iscrowd": int(crowd)}
        for i, crowd in zip(rng.integers(200, size=300), rng.random(300) < 0.4, strict=True)
    ]
    annotations = [{"id": n + 1, **entry} for n, entry in enumerate(annotations)]
    path = tmp_path / "set.json"
    categories = [{"id": 1, "name": "a"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    listed = [
        entry["image_id"]
        for entry in filter_images_with_only_crowd_annotations(load_coco_json(str(path), ""))
    ]
    assert 50 < len(listed) < 180
    positions = rng.permutation(len(listed))[: int(20.0 / 100 * len(listed))].tolist()
    index = tmp_path / "COCO_supervision.txt"
    index.write_text(json.dumps({"20.0": {"4": positions}}))
    split = read_unbiased_teacher(index, read_source(path), path, 20.0, 4)
    assert split.labeled == {listed[position] for position in positions}
    assert split.unlabeled == set(listed) - split.labeled
