"""The mean time between failures is learned from leases, and outlives a restart with the run's standing."""

from __future__ import annotations

import pytest

from coordinator.losses import PRIOR_S, Losses
from coordinator.state import Lifeline, State


def lifeline(began_s: float, heard_s: float) -> Lifeline:
    return Lifeline(ends_s=0.0, overdue_s=0.0, heard_s=heard_s, advanced_s=0.0, began_s=began_s)


def test_it_starts_with_a_guess_and_ends_with_what_was_seen() -> None:
    state = State()
    losses = Losses(state)
    assert losses.mtbf_s() == PRIOR_S
    for _ in range(100):
        losses.lost(lifeline(began_s=5.0, heard_s=15.0))
    assert losses.mtbf_s() == pytest.approx(10.0, rel=0.05)
    later = State([state.standing])
    assert Losses(later).mtbf_s() == losses.mtbf_s()


def test_workers_that_stay_make_it_long() -> None:
    losses = Losses(State())
    losses.kept(lifeline(began_s=0.0, heard_s=3000.0), now=3600.0)
    assert losses.mtbf_s() == 3600.0 + PRIOR_S
