"""
What holds for every method and filter on every host, through the host's own run.

A method that is not in the table of `contract.methods` does not exist.
"""

import pytest
import torch

from contract.hosts import HOSTS, Host, read_losses
from contract.methods import CASES
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY
from ssod.core.method import METHOD_REGISTRY
from tiny_run import BURN_IN_ITERS, MAX_ITER, differences

STOPS = (BURN_IN_ITERS, BURN_IN_ITERS + 1, MAX_ITER)
# Without decay what moves has a gradient. In parts, as these could change each other's draws.
KEYS = (
    *("SSOD.DATA.VAL_JSON", "", "SSOD.LOG_PERIOD", 1, "SOLVER.WEIGHT_DECAY", 0),
    *("SSOD.ACCUMULATE_STEPS", 2, "SSOD.EMA_DECAY", 0.75),
)


@pytest.fixture(scope="module", params=HOSTS)
def host(request, shapes):
    return Host(request.param, shapes, *KEYS)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def stopped(host, case, tmp_path_factory):
    """A run that was stopped twice: its last part, its folder, and the states at its stops."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    states = {}
    for stop in STOPS:
        run = host.train(output, *case.overrides, "SOLVER.MAX_ITER", stop)
        states[stop] = host.read(output)
    return run, output, states


def test_every_filter_and_method_is_in_the_table():
    assert {case.filter for case in CASES.values()} == {
        name for name, cls in PSEUDO_LABEL_FILTER_REGISTRY if cls.__module__.startswith("ssod.core")
    }
    assert {name for case in CASES.values() for name in case.methods} == {
        cls.group for _, cls in METHOD_REGISTRY if cls.__module__.startswith("ssod.core")
    }


def test_the_run_has_the_filter_and_the_methods(case, stopped):
    run, _, _ = stopped
    assert type(run.model.pseudo_label_filter).__name__ == case.filter
    assert tuple(run.model.methods) == case.methods
    assert bool(list(run.model.methods.parameters())) == case.trains


def test_every_trained_parameter_moves_after_the_burn_in(stopped):
    run, _, states = stopped
    before, after = (states[stop]["model"] for stop in (BURN_IN_ITERS, MAX_ITER))
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in names} == {
        "student",
        *(["methods"] if bool(list(run.model.methods.parameters())) else []),
    }
    assert [name for name in names if torch.equal(before[name], after[name])] == []


def test_teacher_changes_by_the_average_alone(stopped):
    run, _, states = stopped
    start, after = (states[stop]["model"] for stop in STOPS[:2])
    teacher = {name for name in start if name.startswith("teacher.")}
    for name in teacher:
        student = name.replace("teacher.", "student.", 1)
        assert torch.equal(start[name], start[student]), name
        if start[name].is_floating_point():
            expected = 0.75 * start[name].double() + 0.25 * after[student].double()
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(start[name], after[name]) for name in teacher)
    parameters = list(run.model.teacher.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in parameters)


def test_losses_are_finite_and_learn_something(case, stopped):
    _, output, _ = stopped
    after = read_losses(output)
    assert len(after) == MAX_ITER - BURN_IN_ITERS
    losses = [{k: v for k, v in line.items() if k.startswith("loss_")} for line in after]
    assert all(0 <= v < float("inf") for line in losses for v in line.values())
    expected = {f"loss_{n}" for n in ("cls", "box_reg", "rpn_cls", "rpn_loc")}
    expected |= {f"{name}_unsup" for name in expected}
    assert all(line.keys() >= expected | set(case.losses) for line in losses)
    for name in ("loss_cls_unsup", "loss_rpn_cls_unsup", *case.losses):
        assert max(line[name] for line in losses) > 0, name


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(host, case, stopped, tmp_path):
    _, output, states = stopped
    host.train(tmp_path / "run", *case.overrides)
    whole = host.read(tmp_path / "run")
    for part in ("model", "optimizer", "skipped"):
        assert differences(states[MAX_ITER][part], whole[part]) == [], part
    lines = (read_losses(run) for run in (output, tmp_path / "run"))
    assert differences(*lines) == []


def test_switched_off_it_changes_no_draw_and_no_loss_of_the_rest(host, case, tmp_path):
    if not case.methods:
        case = CASES["LSM"]  # of filters there is always one
    last = ("SOLVER.MAX_ITER", BURN_IN_ITERS + 1)
    host.train(tmp_path / "plain", *case.without_methods.overrides, *last)
    host.train(tmp_path / "off", *case.overrides, *case.off, *last)
    (plain,), (off,) = (read_losses(tmp_path / name) for name in ("plain", "off"))
    rest = [name for name in plain if name.startswith("loss_")]
    assert differences({n: off[n] for n in rest}, {n: plain[n] for n in rest}) == []


def test_bfloat16_trains(host, case, stopped, tmp_path):
    amp = ("SOLVER.AMP.ENABLED", True, "SSOD.AMP_DTYPE", "bfloat16")
    host.train(tmp_path / "run", *case.overrides, *amp)
    model = host.read(tmp_path / "run")["model"]
    assert all(
        v.isfinite().all() for n, v in model.items() if n.startswith(("stud", "teach", "me"))
    )
    (first, *_), (exact, *_) = (read_losses(run) for run in (tmp_path / "run", stopped[1]))
    assert first["loss_rpn_cls"] == pytest.approx(exact["loss_rpn_cls"], rel=0.1)
    assert first["loss_rpn_cls"] != exact["loss_rpn_cls"]
