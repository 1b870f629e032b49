"""Deadlines follow from what was measured: even gaps make them tight, uneven ones loose, few ones none."""

from __future__ import annotations

from coordinator.arrivals import MIN_ARRIVALS, Gaps


def gaps_of(*gaps_s: float) -> Gaps:
    gaps = Gaps()
    for gap_s in gaps_s:
        gaps.observe(gap_s)
    return gaps


def test_too_few_arrivals_say_nothing() -> None:
    assert gaps_of(*[1.0] * (MIN_ARRIVALS - 1)).patience_s(1.0, 60.0) == 60.0


def test_even_gaps_are_trusted_down_to_the_floor() -> None:
    even = gaps_of(*[1.0] * 50)
    assert 1.0 <= even.patience_s(0.0, 60.0) < 1.1
    assert even.patience_s(3.0, 60.0) == 3.0


def test_uneven_gaps_are_given_time() -> None:
    assert gaps_of(*[0.5, 3.5] * 25).patience_s(0.0, 60.0) > 6.0
    assert gaps_of(*[0.5, 3.5] * 25).patience_s(0.0, 5.0) == 5.0


def test_a_machine_that_became_slow_is_waited_for() -> None:
    assert gaps_of(*[1.0] * 50, *[4.0] * 10).patience_s(0.0, 60.0) > 4.0
