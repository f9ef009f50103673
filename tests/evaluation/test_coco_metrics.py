import copy
import json
import math
import sys
from importlib import import_module

import numpy as np
import pytest
import torch

from ssod.evaluation.coco_metrics import coco_metrics, detections_to_coco

CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "unseen"}]


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def evaluator(request, monkeypatch):
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)


def _truth(*boxes, **extra):
    """Ground truth of (image_id, category_id, XYWH box)."""
    annotations = [
        {
            "id": number,  # from 0, which the evaluators alone would not match
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": box[2] * box[3],
            **extra,
        }
        for number, (image_id, category_id, box) in enumerate(boxes)
    ]
    images = [{"id": i, "width": 400, "height": 300, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def _prediction(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def _random_case(seed):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner, size = rng.uniform(0, 150, (count, 2)), 10 ** rng.uniform(0.8, 2.2, (count, 2))
        images, categories = rng.integers(1, 4, count), rng.choice([2, 7], count)
        boxes = np.concatenate([corner, size], axis=1)
        return list(zip(images.tolist(), categories.tolist(), boxes.tolist(), strict=True))

    truth_boxes = boxes(40)
    truth = _truth(*truth_boxes)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = int(rng.random() < 0.2)
    moved = [
        (image_id, category_id, (np.array(box) * rng.uniform(0.85, 1.15, 4)).tolist())
        for image_id, category_id, box in truth_boxes[:30]
    ]
    return truth, [_prediction(*box, rng.random()) for box in moved + boxes(20)]


def test_perfect_predictions(evaluator):
    truth = _truth((1, 2, [10, 10, 20, 20]), (2, 2, [5, 5, 50, 50]), (2, 7, [90, 90, 200, 150]))
    predictions = [
        _prediction(a["image_id"], a["category_id"], a["bbox"], 0.9) for a in truth["annotations"]
    ]
    metrics = coco_metrics(truth, predictions)
    assert math.isnan(metrics.pop("AP-unseen"))
    assert metrics == pytest.approx(dict.fromkeys(metrics, 100.0))


def test_values_by_hand(evaluator):
    # One class. The first detection is false, the second has an IoU of 0.7: a precision of 1/2
    # at every recall level for the 5 thresholds 0.5 ... 0.7, and 0 above.
    truth = _truth((1, 2, [0, 0, 50, 100]))
    predictions = [
        _prediction(1, 2, [200, 0, 50, 50], 0.9),
        _prediction(1, 2, [0, 0, 50, 70.001], 0.8),
    ]
    metrics = coco_metrics(truth, predictions)
    assert metrics["AP"] == pytest.approx(100 * 5 / 10 * 1 / 2)
    assert metrics["AP50"] == pytest.approx(50)
    assert metrics["AP75"] == 0
    assert metrics["AP_M"] == pytest.approx(metrics["AP"])
    assert metrics["AR100"] == pytest.approx(50)
    assert metrics["AP-cat"] == pytest.approx(metrics["AP"])


def test_bands_and_classes_without_truth_are_nan(evaluator):
    metrics = coco_metrics(_truth((1, 2, [0, 0, 50, 50])), [])
    assert {name for name, value in metrics.items() if math.isnan(value)} == {
        "AP_S",
        "AP_L",
        "AP-dog",
        "AP-unseen",
    }


def test_no_predictions_give_zeros(evaluator):
    truth = _truth((1, 2, [0, 0, 10, 10]), (1, 7, [0, 0, 50, 50]), (3, 7, [0, 0, 200, 200]))
    metrics = coco_metrics(truth, [])
    assert all(value == 0 for name, value in metrics.items() if name != "AP-unseen")


def test_no_truth_gives_nan(evaluator):
    metrics = coco_metrics(_truth(), [_prediction(1, 2, [0, 0, 50, 50], 0.5)])
    assert all(math.isnan(value) for value in metrics.values())


def test_crowd_is_neither_object_nor_false_positive(evaluator):
    truth = _truth((1, 2, [0, 0, 50, 50]), (1, 2, [100, 100, 200, 150]))
    truth["annotations"][1]["iscrowd"] = 1
    predictions = [
        _prediction(1, 2, [120, 120, 40, 40], 0.9),
        _prediction(1, 2, [0, 0, 50, 50], 0.8),
    ]
    assert coco_metrics(truth, predictions)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("seed", range(5))
def test_both_evaluators_agree(seed, monkeypatch):
    import_module("faster_coco_eval")  # a development dependency
    truth, predictions = _random_case(seed)
    fast = coco_metrics(truth, predictions)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert fast == pytest.approx(coco_metrics(truth, predictions), abs=1e-6, nan_ok=True)
    assert 0 < fast["AP"] < 100


def test_path_gives_the_same_and_arguments_are_left_alone(evaluator, tmp_path, capsys):
    truth, predictions = _random_case(0)
    before = copy.deepcopy((truth, predictions))
    from_dict = coco_metrics(truth, predictions)
    assert (truth, predictions) == before
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    for either in (path, str(path)):
        assert coco_metrics(either, predictions) == pytest.approx(from_dict, nan_ok=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("image_id, category_id", [(4, 2), (1, 1)])
def test_unknown_ids_are_refused(image_id, category_id):
    with pytest.raises(ValueError, match=r"which lacks (image_id \[4\]|category_id \[1\])"):
        coco_metrics(_truth(), [_prediction(image_id, category_id, [0, 0, 5, 5], 0.5)])


def test_detections_to_coco():
    results = detections_to_coco(
        image_id=3,
        boxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.5, 1.0]]),
        scores=torch.tensor([0.5, 0.25]),
        classes=torch.tensor([1, 0]),
        category_ids=[2, 7],
    )
    assert results == [
        _prediction(3, 7, [1.0, 2.0, 3.0, 6.0], 0.5),
        _prediction(3, 2, [0.0, 0.0, 1.5, 1.0], 0.25),
    ]
    assert detections_to_coco(3, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), []) == []


def _with_byte_order_mark(truth, tmp_path):
    path = tmp_path / "truth.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(truth).encode())
    return path


@pytest.mark.parametrize("change", ["no area", "null iscrowd", "names as ids", "mixed ids", "BOM"])
def test_files_of_other_tools_give_the_same(evaluator, change, tmp_path):
    boxes = [(1, 2, [10, 10, 50, 40]), (2, 7, [5, 5, 20, 20]), (3, 7, [5, 5, 120, 120])]
    truth, found = _truth(*boxes), [_prediction(*box, 0.9) for box in boxes[:2]]
    expected = coco_metrics(truth, found)
    for annotation in truth["annotations"]:
        if change == "no area":
            del annotation["area"]
        elif change == "null iscrowd":
            annotation["iscrowd"] = None
    names = {"names as ids": {1: "a", 2: "b", 3: "c"}, "mixed ids": {2: "b"}}.get(change, {})
    for entry, key in [(i, "id") for i in truth["images"]] + [
        (entry, "image_id") for entry in truth["annotations"] + found
    ]:
        entry[key] = names.get(entry[key], entry[key])
    if change == "BOM":
        truth = _with_byte_order_mark(truth, tmp_path)
    assert coco_metrics(truth, found) == pytest.approx(expected, nan_ok=True)
