from dataclasses import replace

import numpy as np
import pytest
import torch
from asked_teacher import (
    DETECTORS,
    GEOMETRIES,
    ask,
    in_weak_view,
    iterate,
    make_model,
    per_view,
    regressed,
)

from ssod.core.method import Method
from ssod.core.soft_teacher import SALT, SoftTeacher, relative_spread
from ssod.core.structures import Layer

BOTH = [(d, g) for d in DETECTORS for g in GEOMETRIES]


class Doubting(Method):
    """Takes half of every class's probability for the background."""

    group = "DOUBTING"

    def rescore(self, class_probs, embeddings):
        half = class_probs / 2
        half[:, -1] += 0.5
        return half


def _soft_teacher(**options):
    return SoftTeacher(unsup_box_losses=True, **options)


# ---------------------------------------------------------------- background


def _slow_weights(step, sampled):
    weights = []
    for view, rows in enumerate(per_view(sampled, sampled.classes, sampled.weights)):
        for box, label, weight in rows:
            weight = float(weight)
            if label == step.teacher.num_classes:
                for layer in step.unlabeled.layers:
                    weak = in_weak_view(step, layer, view, box)
                    if (weak[2:] > weak[:2]).all():
                        weight *= ask(step, layer, view, weak)[0][-1]
            weights.append(weight)
    return np.array(weights)


@pytest.mark.parametrize("others", [[], [Doubting()]], ids=["alone", "rescored"])
@pytest.mark.parametrize(("detector", "geometry"), BOTH)
def test_background_weighs_what_the_teacher_says_of_the_same_place(detector, geometry, others):
    method = _soft_teacher(jitter=False)
    model = make_model(detector, geometry, *others, method)
    losses, step, sampled = iterate(model, detector, geometry)
    weights = _slow_weights(step, sampled)
    background = (sampled.classes == step.teacher.num_classes).numpy()
    assert background.any() and weights.sum() > 1
    assert geometry == "same" or len({round(w, 4) for w in weights[background]}) > 1
    expected = torch.tensor(weights * len(weights) / weights.sum(), dtype=torch.float32)
    samples = step.main.samples
    torch.testing.assert_close(samples.weights, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(samples.box_weights, sampled.box_weights)
    # The sum of the weighted losses over the sum of the weights.
    ce = -(samples.probs * step.main.regions.logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(
        losses["loss_cls_unsup"],
        (torch.tensor(weights) * ce).sum().float() / weights.sum(),
        rtol=1e-4,
        atol=1e-5,
    )
    metric = model.metrics["pseudo/background_weight"]
    assert float(metric) == pytest.approx(weights[background].mean(), rel=1e-4)


class Beside(Method):
    """Adds a layer whose weak views are far beside the strong ones."""

    group = "BESIDE"

    def mix(self, views, pseudo_labels):
        (layer,) = views.layers
        away = layer.matrices.clone()
        away[:, 0, 2] += 100
        return replace(views, mixed=[layer, Layer(layer.images, away)]), pseudo_labels


def test_a_region_of_which_a_layer_shows_nothing_is_background_there():
    found = []
    for others in ([], [Beside()]):
        model = make_model("fake", "moved", *others, _soft_teacher(jitter=False))
        losses, step, _ = iterate(model, "fake", "moved")
        assert len(step.unlabeled.layers) == 1 + len(others)
        found.append(losses["loss_cls_unsup"])
    assert found[0] == found[1] > 0


def test_a_teacher_that_knows_only_objects_leaves_no_weight_and_no_nan():
    model = make_model("fake", "same", _soft_teacher(jitter=False), thresholds=(1.0, 1.0))
    with torch.no_grad():
        model.teacher.classifier.bias[-1] = -1e4
    losses, step, _ = iterate(model, "fake", "same")
    assert losses["loss_cls_unsup"] == 0
    losses["loss_cls_unsup"].backward()
    assert torch.equal(model.student.body.weight.grad, torch.zeros(4, 3, 1, 1))
    assert not step.main.samples.weights.any()


def test_a_teacher_that_knows_only_background_changes_nothing():
    found = []
    for methods in ([_soft_teacher()], []):
        model = make_model("fake", "same", *methods)
        with torch.no_grad():
            model.teacher.classifier.bias[-1] = 1e4
        found.append(iterate(model, "fake", "same")[0])
    assert found[0] == found[1]


# ---------------------------------------------------------------- jitter


def test_spread_by_hand():
    copies = torch.tensor([[[0.0, 0, 10, 5]], [[1.0, 0, 11, 7]], [[2.0, 0, 12, 6]]])
    # Standard deviations 1, 0, 1 and 1, of a mean box of 10 x 6.
    expected = (1 / 10 + 0 + 1 / 10 + 1 / 6) / 4
    assert relative_spread(copies).tolist() == pytest.approx([expected])
    small = copies.clone()
    small[..., 2:] = small[..., :2]  # no side: 1 pixel
    assert relative_spread(small).tolist() == pytest.approx([0.5])
    assert relative_spread(copies[:, :0]).shape == (0,)


def _slow_spreads(step, seed, copies=10, offset=0.06):
    """The spread of each box of each strong view, and the boxes in the order of the draws."""
    generator = torch.Generator().manual_seed(seed + SALT)
    count = sum(map(len, step.learned))
    noise = torch.randn(count, copies, 4, generator=generator).double().numpy()
    spreads = []
    for view, labels in enumerate(step.learned):
        for found, label, own in zip(labels.found, labels.classes, labels.layer, strict=True):
            layer = step.unlabeled.layers[own]
            box = found.double().numpy()
            sides = np.tile(box[2:] - box[:2], 2)
            moved = [
                regressed(step, layer, view, box + offset * sides * draw, int(label))
                for draw in noise[len(spreads)]
            ]
            mean = np.mean(moved, 0)
            sides = np.tile(np.maximum(mean[2:] - mean[:2], 1), 2)
            spreads.append((np.std(moved, 0, ddof=1) / sides).mean())
    return np.array(spreads)


@pytest.mark.parametrize(("detector", "geometry"), BOTH)
def test_coordinates_are_learned_from_boxes_that_are_found_again(detector, geometry):
    method = _soft_teacher(background=False)
    model = make_model(detector, geometry, method)
    _, step, _ = iterate(model, detector, geometry)
    spreads = _slow_spreads(step, seed=7)
    # A bound in the widest gap of the middle, so that rounding decides nothing.
    ranked = np.sort(spreads)
    middle = range(len(ranked) // 4, max(3 * len(ranked) // 4, len(ranked) // 4 + 1))
    cut = max(middle, key=lambda i: ranked[i + 1] - ranked[i])
    method.max_spread = float(ranked[cut : cut + 2].mean())
    _, step, sampled = iterate(model, detector, geometry)
    stable = torch.tensor(spreads < method.max_spread).split([len(x) for x in step.learned])
    expected = [
        1.0 if label == step.teacher.num_classes else float(own[row])
        for rows, own in zip(
            per_view(sampled, sampled.classes, sampled.matched), stable, strict=True
        )
        for _, label, row in rows
    ]
    samples = step.main.samples
    assert samples.box_weights.tolist() == expected
    objects = samples.classes < step.teacher.num_classes
    assert {0.0, 1.0} == set(samples.box_weights[objects].tolist())
    assert torch.equal(samples.weights, sampled.weights)
    # The undecided are among them, though no class is learned from these.
    undecided = objects & (samples.weights == 0)
    assert undecided.any()
    found = float(model.metrics["pseudo/stable_per_image"])
    count = (spreads < method.max_spread).sum() / len(step.unlabeled.layers)
    assert found == pytest.approx(count / 3)


def test_undecided_boxes_teach_coordinates_but_no_class():
    method = _soft_teacher(background=False, max_spread=100.0)
    model = make_model("fake", "same", method, thresholds=(1.0, 0.0))
    losses, step, sampled = iterate(model, "fake", "same")
    objects = step.main.samples.classes < step.teacher.num_classes
    assert objects.any() and not sampled.box_weights[objects].any()
    assert not step.main.samples.weights[objects].any()
    assert step.main.samples.box_weights.all()
    assert losses["loss_box_reg_unsup"] > 0
    method.max_spread = 0.0
    assert iterate(model, "fake", "same")[0]["loss_box_reg_unsup"] == 0


def test_draws_are_of_the_iteration_and_leave_the_others_alone():
    model = make_model("fake", "same", _soft_teacher())
    states = []
    for seed in (7, 7, 65_537 + 7):
        iterate(model, "fake", "same", seed)
        torch.manual_seed(seed)
        untouched = torch.get_rng_state()
        iterate(model, "fake", "same", seed)
        assert torch.equal(torch.get_rng_state(), untouched)
        states.append(torch.rand(3))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    _, step, _ = iterate(model, "fake", "same")
    assert not np.allclose(_slow_spreads(step, 7), _slow_spreads(step, 65_537 + 7))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_without_boxes_it_weighs_background_alone(detector, geometry):
    model = make_model(detector, geometry, _soft_teacher(), thresholds=(1.0, 1.0))
    losses, step, _ = iterate(model, detector, geometry)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_cls_unsup"] > 0 and losses["loss_box_reg_unsup"] == 0
    assert model.metrics["pseudo/stable_per_image"] == 0
    assert (step.main.samples.classes == step.teacher.num_classes).all()


@pytest.mark.parametrize(
    "method", [SoftTeacher(background=False), _soft_teacher(background=False, jitter=False)]
)
def test_with_both_parts_off_the_samples_are_the_hosts(method):
    model = make_model("torchvision", "same", method)
    _, step, sampled = iterate(model, "torchvision", "same")
    assert step.main.samples is sampled
    assert not {"pseudo/background_weight", "pseudo/stable_per_image"} & model.metrics.keys()
