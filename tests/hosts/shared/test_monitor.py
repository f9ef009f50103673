import logging
import math

import pytest
import torch

from ssod.core.structures import PseudoLabels
from ssod.hosts import monitor
from ssod.hosts.metric_window import MetricWindow
from ssod.hosts.monitor import BoundAlarm, WeightAlarm, monitor_pseudo_labels
from ssod.hosts.torchvision.run import Run
from tiny_run import BURN_IN_ITERS, tiny_config

LONG = WeightAlarm.PATIENCE


def _read(sums, iterations=1):
    """The metrics of some iterations with these sums an image."""
    window = MetricWindow()
    for _ in range(iterations):
        window.add({f"pseudo/{k}_per_image": torch.tensor(v) for k, v in sums.items()})
        window.add_flag(torch.tensor(True))
    values, finite, counts = window.read([2, 3], {"seconds": 0.5})
    assert (values.pop("seconds"), finite, counts) == (0.5, [True] * iterations, [2, 3])
    return values


def _warnings(caplog, alarm, lines):
    """Messages for lines of (boxes per image, their mean weight), 20 iterations apart."""
    with caplog.at_level(logging.WARNING):
        for index, (num, weight) in enumerate(lines):
            sums = {"num": num, "weight": num * weight, "score": num}
            alarm.update(20 * index, _read(sums))
    return caplog.messages


@pytest.mark.parametrize(("weight", "text"), [(0.1, "0.10"), (0.99, "0.99")])
def test_mean_weight_out_of_range_for_long_is_told_once(caplog, weight, text):
    # Most iterations have no box; they say nothing of the weight of those that do.
    lines = [(3.0, weight), (0.0, 0.0), (0.0, 0.0)] * 50
    (message,) = _warnings(caplog, WeightAlarm(is_soft=True), lines)
    assert f"iteration {LONG}: " in message and f"mean weight of {text}" in message


def test_noise_does_not_hide_a_mean_out_of_range(caplog):
    lines = [(1.0, 0.3 if index % 4 == 0 else 0.02) for index in range(100)]
    assert len(_warnings(caplog, WeightAlarm(is_soft=True), lines)) == 1


@pytest.mark.parametrize(
    ("is_soft", "lines"),
    [
        (True, [(2.0, 0.5)] * 100),
        (True, [(0.1, 0.69), (0.0, 0.0)] * 50),
        (True, [(2.0, 0.1)] * 20),
        (False, [(2.0, 1.0)] * 100),
    ],
    ids=["in range", "few boxes", "not for long", "a fixed threshold"],
)
def test_what_is_no_failure_is_not_told(caplog, is_soft, lines):
    assert _warnings(caplog, WeightAlarm(is_soft), lines) == []


def test_a_filter_that_keeps_nothing_is_told(caplog):
    (message,) = _warnings(caplog, WeightAlarm(is_soft=False), [(0.0, 0.0)] * 100)
    assert "do not exist" in message


def test_mean_score_and_weight_are_those_of_boxes():
    values = _read({"num": 2.0, "weight": 0.5, "score": 1.5}, iterations=3)
    assert values == {
        "pseudo/num_per_image": 2.0,
        "pseudo/mean_weight": 0.25,
        "pseudo/mean_score": 0.75,
    }
    assert _read({"num": 0.0, "weight": 0.0, "score": 0.0}) == {"pseudo/num_per_image": 0.0}


def test_a_window_means_over_finite_values_and_forgets_them():
    window = MetricWindow()
    for value, is_finite in ((1.0, True), (float("inf"), False), (4.0, True)):
        window.add({"loss": torch.tensor(value)})
        window.add_flag(torch.tensor(is_finite))
    values, finite, _ = window.read([], {})
    assert (values, finite) == ({"loss": 2.5}, [True, False, True])
    window.add({"loss": torch.tensor(7.0)})
    window.add_flag(torch.tensor(True))
    assert window.read([], {})[:2] == ({"loss": 7.0}, [True])


def test_the_burn_in_has_no_pseudo_labels():
    WeightAlarm(is_soft=True).update(0, {"loss_cls": 1.0})


def test_a_run_that_keeps_nothing_warns(shapes, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(WeightAlarm, "PATIENCE", 1)
    keys = ("SSOD.FILTER.SCORE_THRESH", 1.0, "SSOD.LOG_PERIOD", 1, "SSOD.DATA.VAL_JSON", "")
    Run(tiny_config(shapes, tmp_path, *keys)).train()
    assert sum("do not exist" in message for message in caplog.messages) == 1


def test_boxes_that_are_undecided_are_not_measured(shapes, tmp_path, monkeypatch):
    trainer = Run(tiny_config(shapes, tmp_path))
    images, model = trainer.data.hidden_truth, trainer.model
    model.iteration = BURN_IN_ITERS
    model.start_teacher_if_due()

    def true_boxes_and_a_wrong_one(*_):
        for record in (images[i] for i in range(len(images))):
            boxes = torch.cat([torch.from_numpy(record.boxes), torch.zeros(1, 4)])
            classes = torch.cat([torch.from_numpy(record.classes), torch.zeros(1).long()])
            scores = torch.ones(len(boxes))
            reliable = torch.ones(len(boxes)).bool()
            reliable[-1] = False
            yield record, PseudoLabels(boxes, classes, scores, scores, scores, boxes, reliable)

    monkeypatch.setattr(monitor, "label_images", true_boxes_and_a_wrong_one)
    counts = torch.arange(images.num_classes)
    quality = monitor_pseudo_labels(model, images, counts, trainer.cfg, trainer.device)
    assert quality["pseudo/precision"] == quality["pseudo/recall"] == 1
    assert quality["pseudo/recall_tail"] == 1
    assert quality["pseudo/boxes_per_image"] == quality["pseudo/true_boxes_per_image"]
    assert quality["pseudo/class_kl"] == 0


def test_recall_of_the_tail_is_that_of_the_classes_with_the_fewest_labels(
    shapes, tmp_path, monkeypatch
):
    """The teacher finds every object of the classes 0, 2 and 4 of six."""
    trainer = Run(tiny_config(shapes, tmp_path))
    images, model = trainer.data.hidden_truth, trainer.model
    model.iteration = BURN_IN_ITERS
    model.start_teacher_if_due()

    def even_classes(*_):
        for record in (images[i] for i in range(len(images))):
            boxes, classes = torch.from_numpy(record.boxes), torch.from_numpy(record.classes)
            ones = torch.ones(len(boxes))
            found = PseudoLabels(boxes, classes, ones, ones, ones, boxes, ones.bool())
            yield record, found[classes % 2 == 0]

    monkeypatch.setattr(monitor, "label_images", even_classes)
    true = torch.from_numpy(images.class_counts)
    for tail in ([0, 4], [1, 5], [1, 2]):
        counts = torch.full((images.num_classes,), 7)
        counts[tail] = torch.tensor([3, 0])
        quality = monitor_pseudo_labels(model, images, counts, trainer.cfg, trainer.device)
        found = sum(true[label] for label in tail if label % 2 == 0)
        assert quality["pseudo/recall_tail"] == pytest.approx(float(found / true[tail].sum()))
        assert quality["pseudo/recall"] == pytest.approx(float(true[::2].sum() / true.sum()))


COSINE, CHANGE, CONTRAST = BoundAlarm.BOUNDS


def _bound_warnings(caplog, name, values):
    """Messages for values of a metric, 20 iterations apart; None where it is missing."""
    alarm = BoundAlarm()
    with caplog.at_level(logging.WARNING):
        for index, value in enumerate(values):
            found = {} if value is None else {name: value}
            alarm.update(20 * index, found | {"pseudo/daso_coefficient": 0.5})
    return caplog.messages


@pytest.mark.parametrize(
    ("name", "values", "parts"),
    [
        (COSINE, [0.97, 0.91] * 60, ["prototypes", "cosine of 0.94", "SSOD.DASO.T_PROTO"]),
        (CHANGE, [0.6, 0.2] * 60, ["windows", "difference of 0.40", "SSOD.DASO.WINDOW"]),
        (CONTRAST, [0.95] * 100, ["cosine of 0.95", "SSOD.CONTRASTIVE.WEIGHT"]),
        (CONTRAST, [None] * 50 + [0.99, 0.89] * 50, ["cosine of 0.94"]),
        (CONTRAST, [math.nan, math.nan, 0.95] * 50, ["cosine of 0.95"]),  # there is rarely a pair
        (CONTRAST, [0.3] * 50 + [0.95] * 50, ["cosine of 0.95"]),
    ],
)
def test_what_is_too_high_for_long_is_told_once(caplog, name, values, parts):
    (message,) = _bound_warnings(caplog, name, values)
    assert all(part in message for part in parts)
    assert f"for {BoundAlarm.PATIENCE} iterations" in message


def test_each_metric_has_a_warning_of_its_own(caplog):
    alarm = BoundAlarm()
    for iteration in range(0, 3000, 20):
        is_blended = iteration >= 2000
        values = {COSINE: 0.95, CHANGE: 0.1, CONTRAST: 0.99}
        alarm.update(iteration, values | {"pseudo/daso_coefficient": float(is_blended)})
        # Before anything is blended, prototypes do no harm.
        assert len(caplog.messages) == (iteration >= 500) + (iteration >= 2500)


@pytest.mark.parametrize("name", [COSINE, CHANGE, CONTRAST])
@pytest.mark.parametrize(
    "values",
    [[0.25] * 100, [0.99] * 20, [0.99] * 5 + [0.1] * 95, [None] * 100, [math.nan] * 100],
    ids=["in range", "not for long", "at the start", "no such method", "nothing measured"],
)
def test_what_is_in_bounds_is_not_told(caplog, name, values):
    assert _bound_warnings(caplog, name, values) == []


@pytest.mark.parametrize(("group", "name"), [("DASO", COSINE), ("CONTRASTIVE", CONTRAST)])
def test_a_run_whose_embeddings_are_alike_warns(shapes, tmp_path, monkeypatch, caplog, group, name):
    monkeypatch.setattr(BoundAlarm, "PATIENCE", 1)
    monkeypatch.setattr(BoundAlarm, "BOUNDS", {name: (-2.0, *BoundAlarm.BOUNDS[name][1:])})
    keys = (f"SSOD.{group}.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", 0.05)
    keys += ("SSOD.LOG_PERIOD", 1, "SSOD.DATA.VAL_JSON", "")
    # Enough boxes that something is blended.
    keys += ("SSOD.DASO.DELAY", 0, "SSOD.DASO.WINDOW", 1, "SSOD.DASO.POOL_FLOOR", 0.0)
    keys += ("TEST.DETECTIONS_PER_IMAGE", 100, "SOLVER.IMS_PER_BATCH", 4)
    keys += ("SSOD.DATA.UNLABELED_PER_BATCH", 4, "SOLVER.MAX_ITER", 8)
    Run(tiny_config(shapes, tmp_path, *keys)).train()
    assert sum("mean cosine of" in message for message in caplog.messages) == 1


def test_nothing_is_measured_until_there_are_thresholds(shapes, tmp_path):
    keys = ("SSOD.FILTER.NAME", "AdaptiveClassThreshold")
    trainer = Run(tiny_config(shapes, tmp_path, *keys))
    images, model = trainer.data.hidden_truth, trainer.model
    model.iteration = BURN_IN_ITERS
    model.start_teacher_if_due()
    counts = torch.from_numpy(trainer.data.labeled.class_counts)
    assert monitor_pseudo_labels(model, images, counts, trainer.cfg, trainer.device) == {}
