import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssod.core.ema import update_ema


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).to(dtype)


def _train(model, seed):
    """One step that changes parameters and batch norm statistics."""
    torch.manual_seed(seed)
    images = torch.rand(2, 3, 4, 4, dtype=next(model.parameters()).dtype)
    model(images).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    model.zero_grad()


def _floating_state(model):
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("decay", [0.3, 0.5, 0.9996])
def test_equals_averaged_model_of_torch(decay):
    student = _model()
    teacher = copy.deepcopy(student)
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.update_parameters(student)  # the first update of `AveragedModel` is a copy
    for step in range(5):
        _train(student, step)
        update_ema(teacher, student, decay)
        averaged.update_parameters(student)
    expected = _floating_state(averaged.module)
    assert "1.running_var" in expected
    for name, tensor in _floating_state(teacher).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9])
def test_equals_the_weighted_sum_of_all_students(decay):
    student = _model(torch.float64)
    teacher = copy.deepcopy(student)
    expected = {name: tensor.clone() for name, tensor in _floating_state(student).items()}
    steps = 4
    for name in expected:
        expected[name] *= decay**steps
    for step in range(steps):
        _train(student, step)
        update_ema(teacher, student, decay)
        for name, tensor in _floating_state(student).items():
            expected[name] += (1 - decay) * decay ** (steps - 1 - step) * tensor
    for name, tensor in _floating_state(teacher).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("old", [1e30, float("inf"), float("nan")])
def test_decay_zero_copies_exactly_whatever_the_teacher_held(old):
    student, teacher = _model(), _model()
    _train(student, 0)
    with torch.no_grad():
        for tensor in _floating_state(teacher).values():
            tensor.fill_(old)
    update_ema(teacher, student, decay=0.0)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_integer_buffers_are_copied(decay):
    student = _model()
    teacher = copy.deepcopy(student)
    for step in range(3):
        _train(student, step)
    update_ema(teacher, student, decay)
    assert int(teacher[1].num_batches_tracked) == 3
    assert teacher[1].num_batches_tracked.dtype == torch.int64


def test_frozen_parameters_are_averaged_like_the_others():
    student, teacher = _model(), _model()
    student[0].requires_grad_(False)
    with torch.no_grad():
        student[0].weight.fill_(1.0)
        teacher[0].weight.fill_(0.0)
    update_ema(teacher, student, 0.75)
    assert torch.equal(teacher[0].weight, torch.full_like(teacher[0].weight, 0.25))
    assert not student[0].weight.requires_grad


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_writes_into_the_tensors_of_the_teacher_and_not_of_the_student(decay):
    student, teacher = _model(), _model()
    _train(student, 0)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    tensors = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    update_ema(teacher, student, decay)
    for name, tensor in (dict(teacher.named_parameters()) | dict(teacher.named_buffers())).items():
        assert tensor is tensors[name]
        assert tensor.data_ptr() == pointers[name]
        assert tensor.grad_fn is None
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\), got {decay}"):
        update_ema(_model(), _model(), decay)


def test_different_names_are_refused_and_named():
    student = _model()
    student[2].register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match=r"same parameters and buffers.*2\.extra"):
        update_ema(_model(), student, 0.5)
