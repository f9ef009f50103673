import logging

import pytest

from ssod.hosts.monitor import WeightAlarm

LONG = WeightAlarm.PATIENCE


def _warnings(caplog, alarm, lines):
    with caplog.at_level(logging.WARNING):
        for iteration, weight in lines:
            values = {} if weight is None else {"pseudo/mean_weight": weight}
            alarm.update(iteration, values)
    return caplog.messages


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.99])
def test_a_weight_out_of_range_for_long_is_told_once(caplog, weight):
    lines = [(i, weight) for i in range(0, 3 * LONG, 20)]
    (message,) = _warnings(caplog, WeightAlarm(weighs=True), lines)
    assert f"iteration {LONG}: " in message and f"{weight:.2f}" in message


@pytest.mark.parametrize(
    ("weighs", "lines"),
    [
        (True, [(i, 0.5) for i in range(0, 3 * LONG, 20)]),
        (True, [(i, None) for i in range(0, 3 * LONG, 20)]),
        (True, [(i, 0.1) for i in range(0, LONG, 20)]),
        (True, [(i, 0.5 if i == LONG else 0.1) for i in range(0, 2 * LONG, 20)]),
        (False, [(i, 1.0) for i in range(0, 3 * LONG, 20)]),
    ],
    ids=["in range", "burn-in", "not for long", "interrupted", "a fixed threshold"],
)
def test_what_is_no_failure_is_not_told(caplog, weighs, lines):
    assert _warnings(caplog, WeightAlarm(weighs), lines) == []


def test_a_fixed_threshold_that_keeps_nothing_is_told(caplog):
    lines = [(i, 0.0) for i in range(0, 3 * LONG, 20)]
    assert len(_warnings(caplog, WeightAlarm(weighs=False), lines)) == 1
