"""Runs whose teacher starts with the first iteration, on every host, through the host's own run."""

import pytest
import torch

from contract.hosts import HOSTS, Host, read_lines, read_losses
from tiny_run import differences

ITERATIONS = 4
KEYS = (
    *("SSOD.BURN_IN_ITERS", 0, "SSOD.FILTER.SCORE_THRESH", 0.05, "SSOD.LOG_PERIOD", 1),
    *("SSOD.DATA.VAL_JSON", "", "SOLVER.STEPS", []),
)
DECAY = 0.4  # less than the schedule has in the last of these iterations
GAMMA = ("SSOD.EMA_GAMMA", 4, "SSOD.EMA_DECAY", DECAY, "SOLVER.MAX_ITER", ITERATIONS)


@pytest.fixture(scope="module", params=HOSTS)
def host(request, shapes):
    return Host(request.param, shapes, *KEYS)


@pytest.fixture(scope="module")
def stopped(host, tmp_path_factory):
    """The folder of a run that was stopped after each iteration, and the models at its stops."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    models = []
    for stop in range(1, ITERATIONS + 1):
        host.train(output, *GAMMA, "SOLVER.MAX_ITER", stop)
        models.append(host.read(output)["model"])
    return output, models


def _teacher_and_student(model):
    teacher = {n.split(".", 1)[1]: v for n, v in model.items() if n.startswith("teacher.")}
    return teacher, {name: model[f"student.{name}"] for name in teacher}


def test_the_first_iteration_learns_unlabeled_images(stopped):
    output, _ = stopped
    losses = read_losses(output)
    assert len(losses) == len(read_lines(output)) == ITERATIONS
    assert losses[0]["pseudo/num_per_image"] > 0
    assert all(line["loss_cls_unsup"] > 0 for line in losses)


def test_the_teacher_starts_as_a_copy_of_the_untrained_student(host, tmp_path):
    fresh = host.open(tmp_path / "run", "SSOD.EMA_DECAY", 0.75).model.student.state_dict()
    first = {name: value.clone() for name, value in fresh.items()}
    host.train(tmp_path / "run", "SSOD.EMA_DECAY", 0.75, "SOLVER.MAX_ITER", 1)
    teacher, student = _teacher_and_student(host.read(tmp_path / "run")["model"])
    assert any(not torch.equal(student[name], value) for name, value in first.items())
    for name, value in first.items():
        if value.is_floating_point():
            expected = 0.75 * value.double() + 0.25 * student[name].double()
            torch.testing.assert_close(teacher[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_teacher_is_the_average_of_the_students(stopped):
    _, models = stopped
    average, decays = None, [0, 0.2, 1 / 3, DECAY]  # 1 - 4 / (4 + t), and at most the key's
    for decay, model in zip(decays, models, strict=True):
        teacher, student = _teacher_and_student(model)
        new = {n: v.double() for n, v in student.items() if v.is_floating_point()}
        if average is None:
            average = new
            assert all(torch.equal(teacher[name], student[name]) for name in student)
        average = {n: decay * average[n] + (1 - decay) * v for n, v in new.items()}
        for name, value in average.items():
            torch.testing.assert_close(teacher[name].double(), value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(teacher[name], student[name]) for name in student)


def test_an_uninterrupted_run_has_the_same_teacher(host, stopped, tmp_path):
    output, models = stopped
    host.train(tmp_path / "run", *GAMMA)
    assert differences(host.read(tmp_path / "run")["model"], models[-1]) == []
    assert differences(read_losses(tmp_path / "run"), read_losses(output)) == []
