import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from asked_teacher import (
    DETECTORS,
    GEOMETRIES,
    ask,
    clip,
    in_weak_view,
    iou,
    iterate,
    make_model,
    per_view,
)

from ssod.core.label_match import LabelMatch
from ssod.core.method import Method
from ssod.core.pseco import PseCo, mean_iou_of_box, prediction_guided_assignment

BOTH = [(d, g) for d in DETECTORS for g in GEOMETRIES]
ALL_RELIABLE = {"fake": (0.3, 0.3), "torchvision": (0.3, 0.3)}


# ---------------------------------------------------------------- assignment of given numbers


def _slow_assignment(ious, scores, min_iou=0.4, num_ious=12):
    """(P,) rows of (M, P) numbers; M for none."""
    num_boxes, num_regions = ious.shape
    rows = np.full(num_regions, num_boxes)
    for box in range(num_boxes):
        bag = [
            r for r in range(num_regions) if ious[box, r] >= min_iou and ious[:, r].argmax() == box
        ]
        total = sum(sorted((ious[box, r] for r in bag), reverse=True)[:num_ious])
        k = max(1, math.floor(total + 1e-6))
        best = sorted(bag, key=lambda r: -math.sqrt(ious[box, r] * scores[box, r]))  # stable
        rows[best[:k]] = box
    return rows


@pytest.mark.parametrize("num_regions", [0, 1, 7, 60])
@pytest.mark.parametrize("num_boxes", [0, 1, 2, 5])
def test_assignment_matches_a_loop(num_boxes, num_regions):
    generator = torch.Generator().manual_seed(num_boxes * 100 + num_regions)
    for power in (0.2, 1, 3):
        shape = (2, num_boxes, num_regions)
        ious, scores = torch.rand(shape, generator=generator, dtype=torch.float64)
        ious = ious**power
        ious[:, ::3] = (ious[:, ::3] * 4).round() / 4  # equals among them
        scores[:, ::3] = scores[:, ::3].round()
        found = prediction_guided_assignment(ious, scores)
        assert found.tolist() == _slow_assignment(ious.numpy(), scores.numpy()).tolist()


def test_assignment_by_hand():
    ious = torch.tensor([[0.9, 0.8, 0.7, 0.3, 0.41], [0.1, 0.2, 0.3, 0.2, 0.6]])
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9, 0.0]])
    # Of the first box three are candidates, with a sum of 2.4: the best two by IoU times score. The
    # fifth region is the second box's, of which one at least is learned.
    assert prediction_guided_assignment(ious, scores).tolist() == [2, 0, 0, 2, 1]
    assert prediction_guided_assignment(ious, scores, min_iou=0.75).tolist() == [2, 0, 2, 2, 2]
    assert prediction_guided_assignment(ious, scores, num_ious=1).tolist() == [2, 0, 2, 2, 1]


def test_the_first_of_equals_is_learned_and_a_whole_sum_is_not_rounded_down():
    assert prediction_guided_assignment(*torch.full((2, 1, 3), 0.5)).tolist() == [0, 1, 1]
    nearly = torch.full((1, 4), 0.5)
    nearly[0, 0] -= 1e-7
    assert prediction_guided_assignment(nearly, torch.ones(1, 4)).tolist() == [1, 0, 0, 1]


def test_what_is_not_a_number_is_no_candidate():
    ious = torch.tensor([[math.nan, 0.5, 0.9]])
    scores = torch.tensor([[0.9, 0.9, math.nan]])
    assert prediction_guided_assignment(ious, scores).tolist() == [1, 0, 1]


@pytest.mark.parametrize("num_boxes", [0, 1, 4])
@pytest.mark.parametrize("num_regions", [0, 1, 30])
def test_mean_iou_matches_a_loop(num_boxes, num_regions):
    generator = torch.Generator().manual_seed(num_boxes)
    ious = torch.rand(num_regions, generator=generator)
    rows = torch.randint(num_boxes + 1, (num_regions,), generator=generator)
    expected = [
        np.mean([float(i) for i, other in zip(ious, rows, strict=True) if other == row])
        if row < num_boxes
        else 0.0
        for row in rows
    ]
    assert mean_iou_of_box(ious, rows, num_boxes).tolist() == pytest.approx(expected)


def test_a_mean_that_is_not_a_number_spoils_no_other_box():
    ious, rows = torch.tensor([0.8, math.nan, 0.6]), torch.tensor([0, 0, 1])
    assert mean_iou_of_box(ious, rows, 2).tolist() == pytest.approx([0.4, 0.4, 0.6])


# ---------------------------------------------------------------- in the teacher-student


def _slow_rows(step, sampled):
    """The row of each strong view's box that each region learns, -1 for background."""
    found = []
    for view, (rows, labels) in enumerate(zip(per_view(sampled), step.learned, strict=True)):
        shape = (len(labels), len(rows))
        ious, scores = np.zeros(shape), np.zeros(shape)
        for r, (box,) in enumerate(rows):
            for number, layer in enumerate(step.unlabeled.layers):
                weak = in_weak_view(step, layer, view, box)
                probs, refined = ask(step, layer, view, weak)
                moved = refined[min(probs[:-1].argmax(), len(refined) - 1)]
                moved = clip(step, layer, view, moved)
                for m in range(len(labels)):
                    if labels.layer[m] == number:
                        ious[m, r] = iou(moved, labels.found[m].double().numpy())
                        scores[m, r] = probs[labels.classes[m]]
        found.append(_slow_assignment(ious, scores))
    return [torch.as_tensor(rows) for rows in found]


@pytest.mark.parametrize(("detector", "geometry"), BOTH)
def test_regions_learn_the_box_that_the_teacher_finds_from_them(detector, geometry):
    method = PseCo(voting=False, unsup_box_losses=True)
    model = make_model(detector, geometry, method, thresholds=ALL_RELIABLE[detector])
    _, step, sampled = iterate(model, detector, geometry)
    rows = _slow_rows(step, sampled)
    num_classes = step.teacher.num_classes
    samples = step.main.samples
    assert samples.boxes is sampled.boxes
    flat = (samples.classes, samples.matched, samples.gt_boxes, samples.probs)
    objects = 0
    for view, own, labels in zip(per_view(samples, *flat), rows, step.learned, strict=True):
        for (_, label, matched, box, probs), row in zip(view, own, strict=True):
            if row == len(labels):
                assert label == num_classes and probs.tolist() == [0] * num_classes + [1]
            else:
                objects += 1
                assert (label, matched) == (labels.classes[row], row)
                assert torch.equal(box, labels.boxes[row])
                assert torch.equal(probs, labels.to_targets().probs[row])
    assert (samples.weights == 1).all() and (samples.box_weights == 1).all()
    assert 0 < objects and (objects < len(samples.classes) or detector == "fake")
    assert not torch.equal(samples.classes, sampled.classes)
    metric = model.metrics["pseudo/object_regions_per_image"]
    assert float(metric) == pytest.approx(objects / (3 * len(step.unlabeled.layers)))


@pytest.mark.parametrize(("detector", "geometry"), BOTH)
@pytest.mark.parametrize("assignment", [False, True])
def test_coordinates_weigh_the_students_consistency(detector, geometry, assignment):
    method = PseCo(assignment=assignment, unsup_box_losses=True)
    model = make_model(detector, geometry, method, thresholds=ALL_RELIABLE[detector])
    _, step, _ = iterate(model, detector, geometry)
    samples, regions = step.main.samples, step.main.regions
    groups, ious = {}, []
    decoded = step.student.decode(torch.cat(samples.boxes), regions.deltas.detach())
    views = [i for i, boxes in enumerate(samples.boxes) for _ in boxes]
    for r, (view, label, row) in enumerate(
        zip(views, samples.classes, samples.matched, strict=True)
    ):
        ious.append(0.0)
        if label < step.student.num_classes:
            own = decoded[r, min(int(label), decoded.shape[1] - 1)].double().numpy()
            ious[-1] = iou(own, samples.gt_boxes[r].double().numpy())
            groups.setdefault((view, int(row)), []).append(r)
    u = np.zeros(len(ious))
    for group in groups.values():
        u[group] = np.mean([ious[r] for r in group])
    assert any(len(group) > 1 for group in groups.values()) or detector == "fake"
    expected = np.where(u > 0, u**2 * u.sum() / (u**2).sum(), 0)
    objects = (samples.classes < step.student.num_classes).numpy()
    assert u[objects].max() > 1.01 * u[objects].min()
    expected[~objects] = 1
    assert samples.box_weights.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    metric = float(model.metrics["pseudo/box_consistency"])
    assert metric == pytest.approx(u[objects].mean(), rel=1e-4)
    assert not samples.box_weights.requires_grad


def test_boxes_that_nobody_is_sure_of_stay_ignored():
    """With LabelMatch, whose undecided boxes are targets of weight 0."""
    found = []
    for methods in ([LabelMatch(mining="none")], [LabelMatch(mining="none"), PseCo()]):
        model = make_model("torchvision", "same", *methods)
        found.append(iterate(model, "torchvision", "same"))
    (_, before, _), (_, after, sampled) = found
    ignored = (sampled.classes < 3) & (sampled.weights == 0)
    assert ignored.any() and not ignored.all()
    for name in ("classes", "matched", "gt_boxes", "weights", "box_weights", "probs"):
        old, new = (getattr(step.main.samples, name) for step in (before, after))
        assert torch.equal(old[ignored], new[ignored]), name
    others = after.main.samples.classes[~ignored]
    reliable = [labels.reliable for labels in after.learned]
    assert after.main.samples.look_up(reliable)[~ignored][others < 3].all()


def test_boxes_that_are_mined_are_assigned():
    mining = LabelMatch(min_score=0.0, min_iou=0.0)
    model = make_model("torchvision", "same", mining, PseCo(), thresholds=(1.0, 0.2))
    _, step, sampled = iterate(model, "torchvision", "same")
    assert not sampled.weights[sampled.classes < 3].any()
    objects = step.main.samples.classes < 3
    assert objects.any() and (step.main.samples.weights[objects] == 1).all()
    assert step.main.samples.look_up([p.reliable for p in step.pseudo_labels])[objects].all()


def test_regions_without_area_are_never_objects():
    """A box cannot be encoded in them, even if the teacher finds it best from there."""
    model = make_model("fake", "same", PseCo(), thresholds=ALL_RELIABLE["fake"])
    with torch.no_grad():
        model.teacher.box_deltas.weight.zero_()
        model.teacher.box_deltas.bias.copy_(torch.tensor([-1.0, 0, 1, 0]))
    found = []
    for width in (0.0, 0.01):
        boxes = torch.tensor([[1.0, 0, 1 + width, 2], [0, 1, 4, 4], [0, 0, 4, 4]])
        model.student.propose = lambda f, b, t, boxes=boxes: ([boxes] * len(b), {})
        _, step, _ = iterate(model, "fake", "same")
        found.append((step.main.samples.classes[::3] < 2).any())
    assert found == [False, True]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_without_boxes_it_changes_nothing(detector, geometry):
    method = PseCo(unsup_box_losses=True)
    model = make_model(detector, geometry, method, thresholds=(1.0, 1.0))
    losses, step, sampled = iterate(model, detector, geometry)
    assert all(loss.isfinite() for loss in losses.values())
    assert torch.equal(step.main.samples.classes, sampled.classes)
    assert (step.main.samples.weights == 1).all()
    assert model.metrics["pseudo/object_regions_per_image"] == 0
    assert model.metrics["pseudo/box_consistency"] == 0


@pytest.mark.parametrize("method", [PseCo(assignment=False), PseCo(assignment=False, voting=False)])
def test_with_both_parts_off_the_samples_are_the_hosts(method):
    model = make_model("torchvision", "same", method)
    _, step, sampled = iterate(model, "torchvision", "same")
    assert step.main.samples is sampled
    assert not {"pseudo/object_regions_per_image", "pseudo/box_consistency"} & model.metrics.keys()


class Weighing(Method):
    """Gives coordinates of objects weights of 0, 0.5 and 1."""

    group = "WEIGHING"

    def reweight(self, step, samples, regions):
        weights = torch.arange(len(samples.classes)) % 3 / 2
        return replace(samples, box_weights=weights.masked_fill(samples.classes == 3, 1))


def test_voting_multiplies_weights_of_before_and_rescales_by_them():
    found = []
    for others in ([], [Weighing()]):
        method = PseCo(assignment=False, unsup_box_losses=True)
        model = make_model("torchvision", "same", *others, method, thresholds=(0.3, 0.3))
        _, step, _ = iterate(model, "torchvision", "same")
        found.append((step.main.samples, model.metrics["pseudo/box_consistency"]))
    (plain, mean), (weighted, weighted_mean) = found
    objects = plain.classes < 3
    roots = plain.box_weights[objects].sqrt()
    u = roots * mean / roots.mean()
    before = (torch.arange(len(objects)) % 3 / 2)[objects]
    expected = before * u**2 * (before * u).sum() / (before * u**2).sum()
    torch.testing.assert_close(weighted.box_weights[objects], expected)
    torch.testing.assert_close(weighted_mean, (before * u).sum() / before.sum())
    assert (weighted.box_weights[~objects] == 1).all()
