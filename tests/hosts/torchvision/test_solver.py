import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR

from ssod.config import merge_config
from ssod.errors import InputError
from ssod.hosts.torchvision.build import build_optimizer
from ssod.hosts.torchvision.defaults import get_config
from ssod.hosts.torchvision.schedule import learning_rate


def _config(**keys):
    pairs = {("SSOD." if name == "OPTIMIZER" else "SOLVER.") + name: v for name, v in keys.items()}
    return merge_config(get_config(), "", [str(item) for pair in pairs.items() for item in pair])


@pytest.fixture
def model():
    """Two layers, the second of which is frozen."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("warmup_iters", "steps"),
    [(0, []), (0, [5]), (6, []), (6, [9, 15]), (6, [3, 6, 7])],
    ids=["constant", "step", "warm-up", "both", "step in warm-up"],
)
def test_learning_rate_is_that_of_torchs_schedulers(warmup_iters, steps):
    cfg = _config(
        BASE_LR=0.2, WARMUP_ITERS=warmup_iters, WARMUP_FACTOR=0.01, STEPS=steps, GAMMA=0.3
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedulers = [MultiStepLR(optimizer, steps, gamma=0.3)]
    if warmup_iters:
        schedulers.append(LinearLR(optimizer, 0.01, total_iters=warmup_iters))
    scheduler = ChainedScheduler(schedulers)
    for iteration in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(cfg, iteration) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_learning_rate_at_the_ends_of_the_warm_up():
    cfg = _config(BASE_LR=0.5, WARMUP_ITERS=10, WARMUP_FACTOR=0.2, STEPS=[])
    assert [learning_rate(cfg, i) for i in (0, 5, 10)] == pytest.approx([0.1, 0.3, 0.5])


def test_sgd_follows_its_recurrence_and_leaves_frozen_parameters_alone(model):
    lr, momentum, decay = 0.1, 0.8, 0.3
    cfg = _config(OPTIMIZER="SGD", BASE_LR=lr, MOMENTUM=momentum, WEIGHT_DECAY=decay)
    optimizer = build_optimizer(cfg, model)
    expected = [p.detach().double() for p in model[0].parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    frozen = [p.clone() for p in model[1].parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        for i, parameter in enumerate(model[0].parameters()):
            velocity[i] = momentum * velocity[i] + parameter.grad + decay * expected[i]
            expected[i] = expected[i] - lr * velocity[i]
        optimizer.step()
    for parameter, value in zip(model[0].parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, model[1].parameters(), frozen))


def test_adamw_decays_weights_apart_from_the_gradient(model):
    optimizer = build_optimizer(_config(OPTIMIZER="AdamW", BASE_LR=0.1, WEIGHT_DECAY=0.3), model)
    before = [p.detach().clone() for p in model[0].parameters()]
    for parameter in model[0].parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(model[0].parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * (1 - 0.1 * 0.3))
    for parameter in model[0].parameters():  # the first step is the sign of the gradient
        parameter.grad = torch.full_like(parameter, -7.0)
    before = [p.detach().clone() for p in model[0].parameters()]
    fresh = build_optimizer(_config(OPTIMIZER="AdamW", BASE_LR=0.1, WEIGHT_DECAY=0.0), model)
    fresh.step()
    for parameter, old in zip(model[0].parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old + 0.1)


def test_unknown_optimizer_is_refused(model):
    with pytest.raises(InputError, match='SSOD.OPTIMIZER must be "SGD" or "AdamW", got \'Adam\''):
        build_optimizer(_config(OPTIMIZER="Adam"), model)
