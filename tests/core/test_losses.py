import math

import pytest
import torch
import torch.nn.functional as F

from ssod.core.losses import weighted_box_loss, weighted_classification_loss
from ssod.core.structures import RegionOutput, RegionSamples

GAMMAS = [0.0, 0.5, 1.5, 2.0]


def _inputs(rows, columns=4, dtype=torch.float64):
    """Logits with gradient, soft targets and weights."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, columns, dtype=dtype)).requires_grad_()
    probs = torch.randn(rows, columns, dtype=dtype).softmax(1)
    return logits, probs, torch.rand(rows, dtype=dtype)


def _one_hot(labels, columns):
    return F.one_hot(labels, columns).double()


def _loop_reference(logits, probs, weights, gamma):
    total = 0.0
    for row, target, weight in zip(logits.tolist(), probs.tolist(), weights.tolist(), strict=True):
        partition = sum(math.exp(value) for value in row)
        for value, share in zip(row, target, strict=True):
            q = math.exp(value) / partition
            total += weight * -share * (1 - q) ** gamma * math.log(q)
    return total / max(len(logits), 1)


def _gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def test_values_by_hand():
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([2.0, 1.0])
    expected = (2 * 0.75**2 * math.log(4) + 0.5**2 * math.log(2)) / 2
    loss = weighted_classification_loss(logits, probs, weights, gamma=2.0)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (1, 2), (1, 81), (7, 4), (64, 21)])
def test_matches_loop_reference(rows, columns, gamma):
    logits, probs, weights = _inputs(rows, columns)
    loss = weighted_classification_loss(logits, probs, weights, gamma)
    expected = torch.tensor(_loop_reference(logits, probs, weights, gamma), dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("hard", [True, False])
def test_gamma_zero_and_weight_one_is_cross_entropy(hard):
    logits, probs, _ = _inputs(6)
    target = torch.arange(6) % 4 if hard else probs
    expected = F.cross_entropy(logits, target)
    loss = weighted_classification_loss(
        logits, _one_hot(target, 4) if hard else probs, torch.ones(6, dtype=torch.float64)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(_gradient(loss, logits), _gradient(expected, logits))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_hot_targets_give_the_multi_class_focal_loss(gamma):
    logits, _, weights = _inputs(8)
    labels = torch.arange(8) % 4
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    expected = (weights * (1 - (-cross_entropy).exp()) ** gamma * cross_entropy).mean()
    loss = weighted_classification_loss(logits, _one_hot(labels, 4), weights, gamma)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(_gradient(loss, logits), _gradient(expected, logits))


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_rows_of_weight_zero_count_in_the_divisor_only(gamma):
    logits, probs, weights = _inputs(5)
    weights[3:] = 0
    loss = weighted_classification_loss(logits, probs, weights, gamma)
    first = weighted_classification_loss(logits[:3], probs[:3], weights[:3], gamma)
    torch.testing.assert_close(loss, first * 3 / 5)
    gradient = _gradient(loss, logits)
    assert gradient[:3].any(dim=1).all()
    assert not gradient[3:].any()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_loss_is_linear_in_the_weights(gamma):
    logits, probs, weights = _inputs(5)
    loss = weighted_classification_loss(logits, probs, weights, gamma)
    tripled = weighted_classification_loss(logits, probs, 3 * weights, gamma)
    torch.testing.assert_close(tripled, 3 * loss)


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_no_regions_give_a_zero_connected_to_the_logits(gamma):
    logits, probs, weights = _inputs(0)
    loss = weighted_classification_loss(logits, probs, weights, gamma)
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    assert _gradient(loss, logits).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_extreme_logits_have_finite_values_and_gradients(gamma, dtype):
    logits = torch.tensor([[100.0, -100.0, -100.0]] * 3 + [[-100.0, 100.0, 100.0]], dtype=dtype)
    logits.requires_grad_()
    # Certain and right, certain and wrong, soft, and torn between two classes.
    probs = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]
    weights = torch.ones(4, dtype=dtype)
    loss = weighted_classification_loss(logits, torch.tensor(probs, dtype=dtype), weights, gamma)
    # At a margin of 200 the modulating factor is 0 for the right class and 1 for the others.
    expected = (0 + 200 + 0.5 * 200 + 200 + math.log(2)) / 4
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert _gradient(loss, logits).isfinite().all()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_matches_finite_differences(gamma):
    logits, probs, weights = _inputs(4)
    assert torch.autograd.gradcheck(
        lambda x: weighted_classification_loss(x, probs, weights, gamma), logits
    )


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_a_broken_logit_is_not_hidden(gamma):
    logits, probs, weights = _inputs(3)
    with torch.no_grad():
        logits[1, 2] = float("nan")
    assert weighted_classification_loss(logits, probs, weights, gamma).isnan()


def test_negative_gamma_is_refused():
    with pytest.raises(ValueError, match="gamma must be at least 0, got -0.5"):
        weighted_classification_loss(*_inputs(2), gamma=-0.5)


def _regions(num_regions, num_deltas, seed=0):
    """Head outputs and samples of `num_regions` regions, a third of them background; K = 3."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    corners = 20 * rand(num_regions, 2)
    boxes = torch.cat([corners, corners + 1 + 10 * rand(num_regions, 2)], 1)
    deltas = rand(num_regions, num_deltas, 4).requires_grad_()
    output = RegionOutput(rand(num_regions, 4), deltas, rand(num_regions, 2))
    samples = RegionSamples(
        boxes=[boxes],
        classes=torch.arange(num_regions) % 4,
        matched=torch.zeros(num_regions, dtype=torch.int64),
        gt_boxes=boxes + rand(num_regions, 4),
        weights=rand(num_regions),
        box_weights=rand(num_regions),
        probs=rand(num_regions, 4),
    )
    return output, samples


def _encode(gt_boxes, boxes):
    """Shift relative to the box's size and log of the ratio of sizes: poles for empty boxes."""
    size, gt_size = boxes[:, 2:] - boxes[:, :2], gt_boxes[:, 2:] - gt_boxes[:, :2]
    assert (size > 0).all(), "hosts' encoders refuse empty boxes"
    return torch.cat([(gt_boxes[:, :2] - boxes[:, :2]) / size, (gt_size / size).log()], 1)


@pytest.mark.parametrize("num_deltas", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 1 / 9])
@pytest.mark.parametrize("num_regions", [1, 4, 11])
def test_box_loss_matches_loop_reference(num_regions, beta, num_deltas):
    output, samples = _regions(num_regions, num_deltas)
    expected = 0.0
    targets = _encode(samples.gt_boxes, samples.boxes[0])
    for row, label in enumerate(samples.classes.tolist()):
        if label < 3:
            difference = output.deltas[row, label if num_deltas > 1 else 0] - targets[row]
            for d in difference.abs().tolist():
                loss = d - beta / 2 if d >= beta else d**2 / (2 * beta)
                expected += samples.box_weights[row].item() * loss / num_regions
    actual = weighted_box_loss(output, samples, _encode, beta)
    assert actual.item() == pytest.approx(expected)


def test_box_loss_of_background_alone_is_zero_even_for_empty_boxes():
    output, samples = _regions(6, 3)
    samples.classes = torch.full((6,), 3)
    samples.boxes[0][:, 2:] = samples.boxes[0][:, :2]
    samples.gt_boxes.zero_()
    loss = weighted_box_loss(output, samples, _encode, 0.0)
    (gradient,) = torch.autograd.grad(loss, output.deltas)
    assert loss == 0
    assert (gradient == 0).all()


def test_box_loss_without_regions_is_a_connected_zero():
    loss = weighted_box_loss(*_regions(0, 3), _encode, 0.0)
    assert loss == 0
    loss.backward()
