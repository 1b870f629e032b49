"""The interval between checkpoints follows from what they cost."""

from __future__ import annotations

import pytest

from worker.pace import Pace


def test_the_first_one_comes_early() -> None:
    pace = Pace(least_s=1.0)
    assert not pace.is_due(0.9)
    assert pace.is_due(1.0)


@pytest.mark.parametrize(
    ("cost_s", "wire_s", "interval_s"),
    [
        (0.001, 0.01, 1.0),  # cheap: the least interval
        (0.5, 0.6, 10.0),  # computing: at most 5 % of the time between two
        (0.1, 30.0, 150.0),  # a thin wire: busy with it for at most a fifth of the time
    ],
)
def test_later_ones_cost_their_share(cost_s: float, wire_s: float, interval_s: float) -> None:
    pace = Pace(least_s=1.0)
    pace.took(cost_s, wire_s)
    assert pace.interval_s == pytest.approx(interval_s)
    assert pace.is_due(interval_s + 0.01)
    assert not pace.is_due(interval_s - 0.01)


def test_where_workers_stay_few_are_made() -> None:
    pace = Pace(least_s=1.0, mtbf_s=40.0)
    pace.took(0.05, 0.1)
    assert pace.interval_s == pytest.approx(2.0)  # sqrt(2 * 0.05 * 40)
    pace.mtbf_s = 16000.0
    assert pace.interval_s == pytest.approx(40.0)


def test_failures_in_a_row_double_it() -> None:
    pace = Pace(least_s=1.0)
    pace.failed(0.0, 0.1)
    pace.failed(0.0, 0.1)
    assert pace.interval_s == pytest.approx(4.0)
    pace.took(0.0, 0.1)
    assert pace.interval_s == pytest.approx(1.0)
