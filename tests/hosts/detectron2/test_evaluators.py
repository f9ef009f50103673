"""Detectron2's evaluators, and `evaluate`."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.engine import launch
from detectron2.evaluation import inference_on_dataset, verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from PIL import Image

from ssod.errors import InputError
from ssod.evaluation.coco_metrics import coco_metrics
from ssod.hosts.detectron2 import evaluators
from ssod.hosts.detectron2.launch import leave_process_group
from tiny_detectron2 import tiny_config
from tiny_run import differences

CLASSES = ("cat", "dog")
NUMBERS = itertools.count()  # of the names registered here
SIZE = 100
CAT, OTHER_CAT, DOG = [10, 10, 50, 50], [20, 30, 80, 90], [5, 5, 60, 95]  # XYXY
TRUTH = {"000001": [("cat", CAT), ("dog", DOG)], "000002": [("cat", OTHER_CAT)]}
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # of Detectron2
NO_VAL = ("SSOD.DATA.VAL_JSON", "")
OUR_NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


def _new_name():
    return f"ssod_evaluators_{next(NUMBERS)}"


def _write_voc(root, truth, difficult=()):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for image_id, objects in truth.items():
        Image.new("RGB", (SIZE, SIZE)).save(root / "JPEGImages" / f"{image_id}.jpg")
        text = f"<size><width>{SIZE}</width><height>{SIZE}</height></size>"
        for name, (x0, y0, x1, y1) in objects:
            # The first pixel is 1 and the last one belongs to the box.
            box = {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1}
            bounds = "".join(f"<{key}>{value}</{key}>" for key, value in box.items())
            hard = int((image_id, name) in difficult)
            text += f"<object><name>{name}</name><pose>x</pose><truncated>0</truncated>"
            text += f"<difficult>{hard}</difficult><bndbox>{bounds}</bndbox></object>"
        path = root / "Annotations" / f"{image_id}.xml"
        path.write_text(f"<annotation>{text}</annotation>")
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n".join(truth))


def _register_voc(name, root, year=2007, classes=CLASSES):
    register_pascal_voc(name, str(root), "test", year, list(classes))
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"


@pytest.fixture
def voc(tmp_path):
    """Write and register a VOC set; returns its name."""

    def voc(truth=TRUTH, year=2007, classes=CLASSES, difficult=()):
        name = _new_name()
        _write_voc(tmp_path / name, truth, difficult)
        _register_voc(name, tmp_path / name, year, classes)
        return name

    return voc


def _measure(evaluator, detections, classes=CLASSES):
    """Feed `(name, box, score)` of each image id to an evaluator."""
    evaluator.reset()
    for image_id, found in detections.items():
        instances = Instances((SIZE, SIZE))
        boxes = torch.tensor([box for _, box, _ in found], dtype=torch.float32)
        instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
        instances.scores = torch.tensor([score for *_, score in found])
        instances.pred_classes = torch.tensor([classes.index(name) for name, *_ in found])
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


def _perfect(truth):
    return {i: [(*entry, 0.9) for entry in objects] for i, objects in truth.items()}


@pytest.mark.parametrize("year", [2007, 2012])
def test_perfect_detections_have_an_ap_of_100_by_both_definitions(year, voc, tmp_path):
    results = _measure(evaluators.build_evaluator(voc(year=year), tmp_path), _perfect(TRUTH))
    for kind in ("voc", "coco"):
        for metric in ("AP", "AP50", "AP75"):
            assert results[kind][metric] == pytest.approx(100), (kind, metric)
    assert {type(v) for v in flatten_results_dict(results).values()} == {float}


@pytest.mark.parametrize(
    ("year", "expected"), [(2007, 100 * 6 / 11), (2012, 50)], ids=["11 points", "area"]
)
def test_definitions_differ_as_they_should_if_half_is_found(year, expected, voc, tmp_path):
    """Precision is 1 up to a recall of 1 / 2: at 6 of 11 points, at 51 of 101, on half the area."""
    truth = {"000001": [("cat", CAT)], "000002": [("cat", OTHER_CAT)]}
    name = voc(truth, year, classes=["cat"])
    found = {"000001": [("cat", CAT, 0.9)], "000002": []}
    results = _measure(evaluators.build_evaluator(name, tmp_path), found)
    assert results["voc"]["AP50"] == pytest.approx(expected)
    assert results["coco"]["AP50"] == pytest.approx(100 * 51 / 101)


def test_difficult_objects_count_for_coco_only(voc, tmp_path):
    name = voc(difficult=[("000002", "cat")])
    found = _perfect(TRUTH) | {"000002": []}
    results = _measure(evaluators.build_evaluator(name, tmp_path), found)
    assert results["voc"]["AP50"] == pytest.approx(100)
    assert results["coco"]["AP-dog"] == pytest.approx(100)
    assert results["coco"]["AP-cat"] == pytest.approx(100 * 51 / 101)


def test_annotations_that_an_earlier_run_converted_are_not_used(voc, tmp_path):
    name = voc()
    output = tmp_path / "output"
    _measure(evaluators.build_evaluator(name, output), _perfect(TRUTH))
    (stale,) = output.glob("annotations.json")
    # The set has changed since: each object is elsewhere.
    changed = {i: [(n, [2, 60, 30, 99]) for n, _ in objects] for i, objects in TRUTH.items()}
    _write_voc(tmp_path / name, changed)
    results = _measure(evaluators.build_evaluator(name, output), _perfect(changed))
    assert results["coco"]["AP"] == pytest.approx(100)
    assert [2.0, 60.0, 28.0, 39.0] in [
        a["bbox"] for a in json.loads(stale.read_text())["annotations"]
    ]
    # Nor a file in another folder.
    results = _measure(evaluators.build_evaluator(name, tmp_path / "other"), _perfect(changed))
    assert results["coco"]["AP"] == pytest.approx(100)
    assert MetadataCatalog.get(name).get("json_file") is None


def _measure_on_a_rank(root):
    """Evaluate every second image; each rank has a stale file in its way."""
    _register_voc("ssod_test_ranks", root)
    evaluator = evaluators.build_evaluator("ssod_test_ranks", root / "output")
    own = list(TRUTH)[comm.get_rank() :: comm.get_world_size()]
    results = _measure(evaluator, {i: _perfect(TRUTH)[i] for i in own})
    (root / f"results_{comm.get_rank()}.json").write_text(json.dumps(results))
    leave_process_group()


def test_two_ranks_measure_the_whole_set_together(tmp_path):
    _write_voc(tmp_path, TRUTH)
    (tmp_path / "output").mkdir()
    stale = tmp_path / "output" / "annotations.json"
    stale.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    launch(_measure_on_a_rank, 2, dist_url="auto", args=(tmp_path,))
    first, second = (json.loads((tmp_path / f"results_{r}.json").read_text()) for r in (0, 1))
    assert [first[kind]["AP50"] for kind in ("voc", "coco")] == pytest.approx([100, 100])
    assert second == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"evaluator_type": "lvis"}, r"must be one of \['coco', 'pascal_voc'\], got 'lvis'; set"),
        ({}, r"got None; set MetadataCatalog.get\('ssod_evaluators_[0-9]+'\).evaluator_type"),
        ({"evaluator_type": "pascal_voc", "year": 2010}, r"year must be one of .*, got 2010"),
    ],
)
def test_set_that_cannot_be_evaluated_is_refused(metadata, message, tmp_path):
    name = _new_name()
    MetadataCatalog.get(name).set(**metadata)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        evaluators.build_evaluator(name, tmp_path)


def test_set_without_a_coco_file_is_measured_by_coco_as_well(voc, tmp_path):
    name = voc()
    vars(MetadataCatalog.get(name))["evaluator_type"] = "coco"
    results = _measure(evaluators.build_evaluator(name, tmp_path), _perfect(TRUTH))
    assert results["bbox"]["AP"] == pytest.approx(100)


@pytest.fixture(scope="module")
def model(shapes, tmp_path_factory):
    """A tiny model in train mode whose teacher has started and differs from the student."""
    torch.manual_seed(0)
    model = build_model(tiny_config(shapes, "unused", "SSOD.BURN_IN_ITERS", 0)).train()
    model.teacher_started = True
    torch.nn.init.normal_(model.teacher.roi_heads.box_predictor.cls_score.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def found_by_both(model, shapes, tmp_path_factory):
    """Validation file with some detections of either as truth, so that their AP is not 0."""
    output = tmp_path_factory.mktemp("found")
    evaluators.evaluate(model, tiny_config(shapes, output), output)
    truth = json.loads((shapes / "annotations" / "val.json").read_text())
    found = [_predictions(output, "student")[::7], _predictions(output, "teacher")[::5]]
    truth["annotations"] = [
        {"id": n, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0}
        | {key: r[key] for key in ("image_id", "category_id", "bbox")}
        for n, r in enumerate(itertools.chain(*found), start=1)
    ]
    path = output / "val.json"
    path.write_text(json.dumps(truth))
    return path


@pytest.fixture
def cfg(shapes, tmp_path, found_by_both):
    """The tiny config with that file."""
    return tiny_config(shapes, tmp_path, "SSOD.DATA.VAL_JSON", found_by_both)


def _predictions(output, *folders):
    path = Path(output, "inference", *folders, "coco_instances_results.json")
    return json.loads(path.read_text())


def test_ap_is_that_of_the_predictions_in_the_files(model, cfg, found_by_both):
    results = evaluators.evaluate(model, cfg, cfg.OUTPUT_DIR)
    for kind in ("student", "teacher"):
        predictions = _predictions(cfg.OUTPUT_DIR, kind)
        expected = coco_metrics(found_by_both, predictions)
        found = dict(results[kind]["bbox"])
        assert found.pop("AP_floor_0.001") > 0
        for name, ours in zip(NAMES, OUR_NAMES, strict=True):
            assert found.pop(name) == pytest.approx(expected[ours], abs=1e-6, nan_ok=True)
        classes = {name: value for name, value in expected.items() if name.startswith("AP-")}
        assert found == pytest.approx(classes, abs=1e-6, nan_ok=True)
        assert 0 < expected["AP"] < 100
    assert results["student"]["bbox"]["AP"] != results["teacher"]["bbox"]["AP"]


def _measured_alone(detector, cfg, name, floor, output):
    """Results of Detectron2's own inference at one score floor."""
    detector.roi_heads.box_predictor.test_score_thresh = floor
    loader = evaluators.build_test_loader(cfg, name)
    return inference_on_dataset(detector, loader, evaluators.build_evaluator(name, output))


def test_both_floors_equal_an_inference_at_each(model, cfg, tmp_path, caplog, capsys):
    """Bit for bit, files included; an inference at either floor is Detectron2's own."""
    (name,) = evaluators.test_dataset_names(cfg)
    for floor in (0.25, 0.001):
        folder = tmp_path / str(floor)
        alone = {
            f: _measured_alone(copy.deepcopy(model.teacher), cfg, name, f, folder)
            for f in (0.001, floor)  # the files are of the last
        }
        caplog.clear()
        with model.teacher.at_score_floor(floor), caplog.at_level("INFO"):
            results = evaluators.evaluate(model, cfg, cfg.OUTPUT_DIR)["teacher"]["bbox"]
        assert results.pop("AP_floor_0.001") == alone[0.001]["bbox"]["AP"] > 0
        assert differences(dict(results), dict(alone[floor]["bbox"])) == []
        expected = (folder / "coco_instances_results.json").read_text()
        assert json.loads(expected) == _predictions(cfg.OUTPUT_DIR, "teacher") != []
        tables = [r for r in caplog.records if "Evaluation results for bbox" in r.getMessage()]
        assert len(tables) == 2  # of student and teacher
        capsys.readouterr()
    assert alone[0.001]["bbox"]["AP"] != _ap_at(model, cfg, 0.25)
    assert "inference" not in vars(model.teacher.roi_heads.box_predictor)


def _ap_at(model, cfg, floor):
    with model.teacher.at_score_floor(floor):
        return evaluators.evaluate(model, cfg, cfg.OUTPUT_DIR)["teacher"]["bbox"]["AP"]


def test_top_level_is_what_the_model_is_in_eval_mode(model, cfg, monkeypatch):
    for kind in ("student", "teacher"):
        monkeypatch.setattr(model, "eval_model", kind)
        results = evaluators.evaluate(model, cfg, cfg.OUTPUT_DIR)
        assert sorted(results) == ["bbox", "student", "teacher"]
        assert results["bbox"] == pytest.approx(results[kind]["bbox"], nan_ok=True)
    flat = flatten_results_dict(results)
    assert {"bbox/AP", "student/bbox/AP", "teacher/bbox/AP"} <= flat.keys()
    checked = cfg.clone()
    checked.defrost()
    checked.TEST.EXPECTED_RESULTS = [["bbox", "AP", flat["bbox/AP"], 0.01]]
    assert verify_results(checked, results)


def test_teacher_is_measured_once_it_has_started(model, cfg, monkeypatch):
    monkeypatch.setattr(model, "teacher_started", False)
    results = evaluators.evaluate(model, cfg, cfg.OUTPUT_DIR)
    assert sorted(results) == ["bbox", "student"]
    assert results["bbox"] == pytest.approx(results["student"]["bbox"], nan_ok=True)
    assert [p.name for p in Path(cfg.OUTPUT_DIR, "inference").iterdir()] == ["student"]


def test_training_goes_on_as_if_nothing_had_been_measured(model, cfg):
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    evaluators.evaluate(model, cfg, cfg.OUTPUT_DIR)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert modes["student"] and not modes["teacher"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_several_sets_are_told_apart(model, shapes, cfg, found_by_both, tmp_path):
    names = [_new_name(), _new_name()]
    for name, path in zip(names, (shapes / "annotations" / "val.json", found_by_both), strict=True):
        register_coco_instances(name, {}, str(path), str(shapes / "images"))
    several = tiny_config(shapes, tmp_path, "DATASETS.TEST", names, "SSOD.DATA.VAL_JSON", "")
    results = evaluators.evaluate(model, several, tmp_path)
    single = evaluators.evaluate(model, cfg, tmp_path)
    assert sorted(results) == [*names, "student", "teacher"]
    assert sorted(results["student"]) == names
    for actual, expected in (
        (results[names[1]], single),
        (results["student"][names[1]], single["student"]),
    ):
        assert actual["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)
    folders = {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("coco_inst*.json")}
    assert {Path("inference", k, n) for k in ("student", "teacher") for n in names} <= folders


def test_nothing_is_measured_without_a_test_set(model, shapes, tmp_path):
    assert evaluators.evaluate(model, tiny_config(shapes, tmp_path, *NO_VAL), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_file_is_registered_once(shapes, cfg):
    names = evaluators.test_dataset_names(cfg)
    count = len(DatasetCatalog.list())
    assert evaluators.test_dataset_names(cfg) == names and len(names) == 1
    assert len(DatasetCatalog.list()) == count
    assert MetadataCatalog.get(names[0]).json_file == cfg.SSOD.DATA.VAL_JSON
    other = tiny_config(shapes, "unused")
    assert evaluators.test_dataset_names(other) != names
    assert evaluators.test_dataset_names(tiny_config(shapes, "unused", *NO_VAL)) == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SSOD.DATA.VAL_JSON", "nowhere.json"), "nowhere.json: annotation file not found"),
        (("SSOD.DATA.VAL_IMAGES", "nowhere"), "4 of 4 image files are missing"),
        ((*NO_VAL, "DATASETS.TEST", ["nowhere"]), "nowhere: not in DatasetCatalog"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 80), "val.json.*: has 6 classes, but .*NUM_CLASSES is 80"),
    ],
)
def test_set_that_does_not_fit_is_refused(overrides, message, shapes, model, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluators.evaluate(model, tiny_config(shapes, tmp_path, *overrides), tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("case", ["broken", "missing", "size"])
def test_image_that_cannot_be_used_is_named_in_one_line(
    num_workers, case, model, voc, shapes, tmp_path
):
    classes = ("circle", "square", "a", "b", "c", "d")
    name = voc({"000001": [], "000002": []}, classes=classes)
    path = tmp_path / name / "JPEGImages" / "000002.jpg"
    if case == "broken":
        path.write_bytes(path.read_bytes()[:300])
    elif case == "missing":
        path.unlink()
    else:
        Image.new("RGB", (SIZE, SIZE + 1)).save(path)
    cfg = tiny_config(
        *(shapes, tmp_path, *NO_VAL, "DATASETS.TEST", [name]),
        *("DATALOADER.NUM_WORKERS", num_workers),
    )
    with pytest.raises(InputError) as error:
        evaluators.evaluate(model, cfg, tmp_path)
    assert str(error.value).startswith(f"{path}: cannot be evaluated: ")
    assert "\n" not in str(error.value)
    assert model.student.training and not model.teacher.training
