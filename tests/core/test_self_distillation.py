import math

import pytest
import torch

from ssod.core.self_distillation import self_distillation_loss


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


def test_no_regions_give_a_zero_connected_to_both():
    main, aux = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    loss = self_distillation_loss(main, aux, 16, torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert main.grad.shape == aux.grad.shape == (0, 4)
