"""What `Trainer.evaluate` measures, and the functions it runs detectors with."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssod.core.filters import FixedThreshold
from ssod.core.teacher_student import TeacherStudent
from ssod.data.images import read_image
from ssod.data.records import DetectionDataset, ImageRecord
from ssod.data.views import make_test_view
from ssod.evaluation.coco_metrics import coco_metrics, detections_to_coco
from ssod.hosts import inference
from ssod.hosts.inference import find, label_images
from ssod.hosts.torchvision.run import Run
from tiny_run import differences, read_lines, resume, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainer(finished_run, found_as_truth, shapes):
    """The finished run, loaded from its checkpoint."""
    cfg = tiny_config(shapes, finished_run, "SSOD.DATA.VAL_JSON", found_as_truth)
    return resume(cfg)


@pytest.fixture(scope="module")
def resizing(trainer, shapes, tmp_path_factory):
    """A config that enlarges images, a set, the set of its enlarged images, and their matrices."""
    cfg = tiny_config(shapes, "unused", "INPUT.MIN_SIZE_TEST", 90, "INPUT.MAX_SIZE_TEST", 110)
    folder = tmp_path_factory.mktemp("resized")
    originals = trainer.data.val
    records, matrices = [], []
    for record in (originals[i] for i in range(len(originals))):
        view, matrix = make_test_view(read_image(record.file_name), 90, 110)
        path = folder / f"{record.image_id}.png"
        Image.fromarray(view.permute(1, 2, 0).numpy()).save(path)
        no_boxes, no_classes = np.empty((0, 4), np.float32), np.empty(0, np.int64)
        sides = tuple(view.shape[1:])
        records.append(ImageRecord(record.image_id, str(path), *sides, no_boxes, no_classes))
        matrices.append(matrix)
    resized = DetectionDataset(records, originals.class_names, originals.category_ids)
    assert all(matrix[0, 0] > 1.2 for matrix in matrices)
    return cfg, originals, resized, dict(zip(originals.image_ids, matrices, strict=True))


def detect(detector, dataset, cfg, device):
    """Results at the detector's own score floor."""
    (results,) = inference.detect(detector, dataset, cfg, device, [detector.score_floor])
    return results


def _modes(model):
    return {name: module.training for name, module in model.named_modules()}


def _scaled(box, matrix):
    return [value * matrix[i % 2, i % 2].item() for i, value in enumerate(box)]


def test_evaluating_the_checkpoint_gives_the_log_exactly(trainer, finished_run):
    (logged,) = (line for line in read_lines(finished_run)[-1:])
    assert 0 < logged["student/AP"] < 100 and 0 < logged["teacher/AP"] < 100
    results = trainer.evaluate()
    assert differences({"iteration": trainer.model.iteration} | results, logged) == []


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_written_predictions_give_the_ap_of_the_log(name, finished_run, found_as_truth):
    path = finished_run / "inference" / f"coco_instances_results_{name}.json"
    metrics = coco_metrics(found_as_truth, json.loads(path.read_text()))
    logged = read_lines(finished_run)[-1]
    expected = {key: value for key, value in logged.items() if key.startswith(name)}
    assert expected.pop(f"{name}/AP_floor_0.001") > 0
    assert differences({f"{name}/{key}": v for key, v in metrics.items()}, expected) == []


def _found_alone(detector, dataset, cfg):
    """COCO results of one inference at the config's score floor."""
    return [
        entry
        for record, d in find(detector, dataset, cfg, CPU)
        for entry in detections_to_coco(
            record.image_id, d.boxes, d.scores, d.classes, dataset.category_ids
        )
    ]


def test_both_floors_equal_an_inference_at_each(trainer, shapes, found_as_truth, tmp_path):
    """Bit for bit, the cap of detections included: each image has more above 0.001."""
    val = trainer.val

    def evaluate(floor):
        keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", floor, "SSOD.DATA.VAL_JSON", found_as_truth)
        cfg = tiny_config(shapes, tmp_path, *keys)
        run = Run(cfg, f"{trainer.cfg.OUTPUT_DIR}/checkpoint.pth")
        alone = _found_alone(run.model.teacher, val, cfg)
        results = run.evaluate()
        assert run.model.teacher.score_floor == floor
        written = tmp_path / "inference" / "coco_instances_results_teacher.json"
        assert json.loads(written.read_text()) == alone
        assert results["teacher/AP"] == coco_metrics(found_as_truth, alone)["AP"] > 0
        return results, alone

    low, found = evaluate(0.001)
    assert len(found) == len(val) * trainer.cfg.TEST.DETECTIONS_PER_IMAGE
    assert low["teacher/AP_floor_0.001"] == low["teacher/AP"]
    high, kept = evaluate(sorted(entry["score"] for entry in found)[len(found) // 2])
    assert 0 < len(kept) < len(found)
    assert high["teacher/AP_floor_0.001"] == low["teacher/AP"] != high["teacher/AP"]


def test_evaluation_restores_every_mode(trainer):
    model = trainer.model
    before = _modes(model)
    assert before["student"] and before["pseudo_label_filter"] and not before["teacher"]
    trainer.evaluate()
    assert _modes(model) == before
    model.eval()
    try:
        before = _modes(model)
        trainer.evaluate()
        assert _modes(model) == before and not any(before.values())
    finally:
        model.train()


def test_untrained_model_that_finds_nothing_can_be_evaluated(shapes, tmp_path):
    trainer = Run(tiny_config(shapes, tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99))
    results = trainer.evaluate()
    assert {name.split("/")[0] for name in results} == {"student"}  # no teacher has started
    assert (results["student/AP"], results["student/AR100"]) == (0, 0)
    (written,) = (tmp_path / "inference").iterdir()
    assert written.name == "coco_instances_results_student.json" and written.read_text() == "[]"


@pytest.mark.parametrize("shift", [0, 1], ids=["same classes", "other classes"])
def test_pseudo_labels_are_measured_against_the_hidden_truth(trainer, shapes, tmp_path, shift):
    truth = json.loads((shapes / "annotations" / "unlabeled_truth.json").read_text())
    labeled = label_images(trainer.model, trainer.data.hidden_truth, trainer.cfg, CPU)
    ids = trainer.data.labeled.category_ids
    truth["annotations"] = [  # what the teacher finds, in classes that are right or wrong
        {
            "id": 100 * number + row,
            "image_id": record.image_id,
            "category_id": ids[(int(found.classes[row]) + shift) % len(ids)],
            "bbox": torch.cat([box[:2], box[2:] - box[:2]]).tolist(),
        }
        for number, (record, found) in enumerate(labeled)
        for row, box in enumerate(found.boxes)
    ]
    assert truth["annotations"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    overrides = ("SSOD.DATA.UNLABELED_TRUTH_JSON", tmp_path / "truth.json")
    cfg = tiny_config(shapes, trainer.cfg.OUTPUT_DIR, *overrides)
    results = resume(cfg).evaluate()
    quality = (results["pseudo/precision"], results["pseudo/recall"])
    assert quality == (1, 1) if shift == 0 else quality < (0.5, 0.5)


def test_detections_are_in_pixels_of_the_original(trainer, resizing):
    cfg, originals, resized, matrices = resizing
    found = detect(trainer.model.student, originals, cfg, CPU)
    expected = detect(trainer.model.student, resized, cfg, CPU)
    assert len(found) == len(expected) >= len(originals)
    for result, enlarged in zip(found, expected, strict=True):
        for key in ("image_id", "category_id", "score"):
            assert result[key] == enlarged[key]
        scaled = _scaled(result["bbox"], matrices[result["image_id"]])
        assert scaled == pytest.approx(enlarged["bbox"], abs=1e-3)


def test_detections_lie_in_their_image_and_have_its_categories(trainer):
    val = trainer.data.val
    found = detect(trainer.model.teacher, val, trainer.cfg, CPU)
    assert {result["image_id"] for result in found} == set(val.image_ids)
    assert {result["category_id"] for result in found} <= set(val.category_ids)
    for result in found:
        record = val[val.image_ids.index(result["image_id"])]
        x, y, width, height = result["bbox"]
        assert min(x, y) >= -1e-4 and min(width, height) > 0
        assert x + width <= record.width + 1e-3 and y + height <= record.height + 1e-3


def test_a_model_is_in_its_own_mode_again_after_an_error(trainer, monkeypatch):
    def fail(images):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer.model, "pseudo_labels", fail)
    monkeypatch.setattr(trainer.model.student, "suppress", lambda *args: fail(args))
    trainer.model.train()
    for run, model in ((label_images, trainer.model), (detect, trainer.model.student)):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, trainer.data.val, trainer.cfg, CPU)
        assert model.training


def test_pseudo_labels_are_the_teachers_detections_above_the_threshold(trainer, resizing):
    cfg, originals, _, _ = resizing
    labeled = label_images(trainer.model, originals, cfg, CPU)
    assert [record.image_id for record, _ in labeled] == originals.image_ids
    found = detect(trainer.model.teacher, originals, cfg, CPU)
    threshold = cfg.SSOD.FILTER.SCORE_THRESH
    for record, labels in labeled:
        expected = [
            (r["score"], r["category_id"], *r["bbox"])
            for r in found
            if r["image_id"] == record.image_id and r["score"] > threshold
        ]
        actual = [
            (score, originals.category_ids[label], x1, y1, x2 - x1, y2 - y1)
            for score, label, (x1, y1, x2, y2) in zip(
                labels.scores.tolist(), labels.classes.tolist(), labels.boxes.tolist(), strict=True
            )
        ]
        assert actual == [pytest.approx(row, abs=1e-3) for row in expected]
    assert any(len(labels) for _, labels in labeled)


class _Counting(FixedThreshold):
    """Counts, in train mode alone, the images it filters."""

    def __init__(self):
        super().__init__(0.1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, detections):
        if self.training:
            self.count += len(detections)
        return super().forward(detections)


@pytest.mark.parametrize("mode", [True, False])
def test_labeling_images_changes_neither_filter_nor_modes_nor_weights(trainer, mode):
    student = trainer.model.student
    model = TeacherStudent(
        student, _Counting(), burn_in_iters=0, ema_decay=0.5, unsup_loss_weight=1.0
    ).train(mode)
    try:
        modes, state = _modes(model), copy.deepcopy(dict(model.state_dict()))
        assert len(label_images(model, trainer.data.val, trainer.cfg, CPU)) == 4
        assert _modes(model) == modes
        assert differences(dict(model.state_dict()), state) == []
    finally:
        trainer.model.train()


@pytest.mark.parametrize("mode", [True, False])
def test_detecting_changes_neither_mode_nor_weights(trainer, mode):
    student = copy.deepcopy(trainer.model.student).train(mode)
    modes, state = _modes(student), copy.deepcopy(dict(student.state_dict()))
    assert detect(student, trainer.data.val, trainer.cfg, CPU)
    assert _modes(student) == modes
    assert differences(dict(student.state_dict()), state) == []
    assert all(p.grad is None for p in student.parameters())
