import math

import pytest
import torch

from ssod.core.low_resolution import self_distillation_loss
from ssod.core.self_distillation import SelfDistillation
from ssod.core.structures import PseudoLabels, RegionSamples
from ssod.errors import InputError


def _softmax(row):
    exponents = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponents) for value in exponents]


def _reference(main, aux, weights, normalizer):
    """KL(aux || main) in loops, with its gradients from the calculus by hand."""
    loss, main_grads, aux_grads = 0.0, [], []
    for main_row, aux_row, weight in zip(main, aux, weights, strict=True):
        p, q = _softmax(aux_row), _softmax(main_row)
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        loss += weight * kl / normalizer
        main_grads.append([weight * (b - a) / normalizer for a, b in zip(p, q, strict=True)])
        aux_grads.append(
            [
                weight * a * (math.log(a) - math.log(b) - kl) / normalizer
                for a, b in zip(p, q, strict=True)
            ]
        )
    return loss, main_grads, aux_grads


def _logits(rows, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, classes)
    main, aux = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return main.requires_grad_(), aux.requires_grad_()


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("classes", [2, 5, 81])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_both_gradients_match_a_float64_reference(rows, classes, weighted):
    main, aux = _logits(rows, classes)
    weights = torch.linspace(0, 1, rows, dtype=torch.float64) if weighted else None
    loss = self_distillation_loss(main, aux, 7.0, weights)
    loss.backward()
    ones = [1.0] * rows if weights is None else weights.tolist()
    expected, main_grads, aux_grads = _reference(main.tolist(), aux.tolist(), ones, 7.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(main.grad, torch.tensor(main_grads, dtype=torch.float64))
    torch.testing.assert_close(aux.grad, torch.tensor(aux_grads, dtype=torch.float64))


def test_equal_classifiers_have_neither_loss_nor_gradient():
    main, _ = _logits(4, 6)
    aux = main.detach().clone().requires_grad_()
    loss = self_distillation_loss(main, aux, 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert main.grad.abs().max() < 1e-15
    assert aux.grad.abs().max() < 1e-15


def test_extreme_logits_stay_finite():
    main = torch.tensor([[1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    aux = torch.tensor([[-1e4, 1e4], [1e4, 0.0]], requires_grad=True)
    loss = self_distillation_loss(main, aux, 2.0)
    loss.backward()
    assert loss.isfinite()
    assert main.grad.isfinite().all()
    assert aux.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["sampled", "distilled"])
def test_no_regions_give_a_zero_connected_to_both(norm):
    main, aux = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    loss = SelfDistillation(norm=norm).loss(main, aux, torch.zeros(0), 16)
    loss.backward()
    assert loss == 0
    assert main.grad.shape == aux.grad.shape == (0, 4)


def test_target_decides_the_direction():
    main, aux = _logits(5, 4)
    weights = torch.ones(5, dtype=torch.float64)

    def loss(target):
        return SelfDistillation(target=target).loss(main, aux, weights, 5)

    torch.testing.assert_close(loss("aux"), self_distillation_loss(main, aux, 5))
    torch.testing.assert_close(loss("main"), self_distillation_loss(aux, main, 5))
    torch.testing.assert_close(loss("both"), (loss("aux") + loss("main")) / 2)
    assert not torch.isclose(loss("aux"), loss("main"))


@pytest.mark.parametrize(("target", "learner"), [("aux", 0), ("main", 1)])
def test_detached_targets_get_no_gradient_and_learners_the_same(target, learner):
    logits = _logits(5, 4)
    weights = torch.ones(5, dtype=torch.float64)
    loss = SelfDistillation(target=target).loss(*logits, weights, 5)
    detached = SelfDistillation(target=target, detach=True).loss(*logits, weights, 5)
    assert loss == detached
    expected = torch.autograd.grad(loss, logits[learner])[0]
    torch.testing.assert_close(torch.autograd.grad(detached, logits[learner])[0], expected)
    detached = SelfDistillation(target=target, detach=True).loss(*logits, weights, 5)
    assert torch.autograd.grad(detached, logits[1 - learner], allow_unused=True) == (None,)


def test_norm_divides_by_all_regions_or_by_those_distilled():
    main, aux = _logits(3, 4)
    weights = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    total = self_distillation_loss(main, aux, 1.0, weights)
    sampled = SelfDistillation(norm="sampled", weight=2.0).loss(main, aux, weights, 100)
    distilled = SelfDistillation(norm="distilled", weight=2.0).loss(main, aux, weights, 100)
    torch.testing.assert_close(sampled, 2 * total / 100)
    torch.testing.assert_close(distilled, 2 * total / 1.5)
    few = SelfDistillation(norm="distilled").loss(main, aux, weights / 6, 100)
    torch.testing.assert_close(few, total / 6 / 0.25)  # also where the weights sum to less than 1


def _labels(weights):
    weights = torch.tensor(weights)
    count, zeros = len(weights), torch.zeros(len(weights))
    probs = torch.zeros(count, 4)
    classes = torch.zeros(count, dtype=torch.int64)
    return PseudoLabels(
        torch.zeros(count, 4), classes, zeros, weights, weights, probs, weights == 1
    )


def _samples(classes, matched, sizes):
    rows = torch.zeros(sum(sizes), 4)
    ones = torch.ones(len(rows))
    boxes = list(rows.split(sizes))
    return RegionSamples(
        boxes, torch.tensor(classes), torch.tensor(matched), rows, ones, ones, rows
    )


def test_regions_are_distilled_by_how_little_the_main_branch_learns_of_their_box():
    labels = [_labels([1.0, 0.0, 0.75]), _labels([]), _labels([0.25])]
    # Class 3 is the background; its matches mean nothing.
    samples = _samples([0, 1, 2, 3, 3, 0, 3], [0, 1, 2, 1, 0, 0, 0], [4, 1, 2])
    weights = SelfDistillation().region_weights(torch.randn(7, 4), samples, labels)
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0, 0.25, 0.0, 0.0, 0.75, 0.0]))


def test_regions_can_be_chosen_by_the_auxiliary_score():
    # The last column is the background, whose probability does not count.
    probs = [[0.5, 0.1, 0.4], [0.2, 0.6, 0.2], [0.7, 0.1, 0.2], [0.2, 0.2, 0.6], [0.3, 0.6, 0.1]]
    logits = torch.tensor(probs).log()
    low, high = logits.softmax(1)[[0, 1], [0, 1]].tolist()
    samples = _samples([2] * 5, [0] * 5, [5])

    def chosen(*scores):
        distillation = SelfDistillation(scores=scores)
        return distillation.region_weights(logits, samples, [_labels([1.0])]).tolist()

    assert chosen(0.55, 0.65) == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert chosen(low, high)[:2] == [0.0, 1.0]  # above the lower bound, up to the upper one


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("weight", -1.0, "SSOD.LSM.DISTILL_WEIGHT must be at least 0, got -1.0"),
        ("weight", math.nan, "SSOD.LSM.DISTILL_WEIGHT must be at least 0, got nan"),
        ("target", "teacher", r"SSOD.LSM.DISTILL_TARGET must be one of .*got 'teacher'"),
        ("norm", "mean", r"SSOD.LSM.DISTILL_NORM must be one of .*got 'mean'"),
    ],
)
def test_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        SelfDistillation(**{argument: value})
