"""The waits between attempts."""

from __future__ import annotations

import random

from protocol.patience import FIRST_WAIT_S, LONGEST_WAIT_S, SHORT_WAIT_S, Patience


def test_waits_grow_to_a_bound_and_never_end_without_a_limit() -> None:
    patience = Patience(None, random.Random(0))
    waits = [patience.next_wait_s(now_s=1e6 * attempt) for attempt in range(2000)]
    assert all(wait is not None and 0 < wait <= LONGEST_WAIT_S for wait in waits)
    assert waits[0] is not None
    assert waits[0] <= FIRST_WAIT_S
    assert all(wait is not None and wait >= LONGEST_WAIT_S / 2 for wait in waits[10:])


def test_a_silence_is_at_most_a_second_or_a_quarter_longer_than_it_was() -> None:
    patience, now_s, waits = Patience(None, random.Random(0)), 0.0, []
    while now_s < 20.0:
        wait_s = patience.next_wait_s(now_s)
        assert wait_s is not None
        assert wait_s <= max(SHORT_WAIT_S, now_s / 4)
        waits.append(wait_s)
        now_s += wait_s
    assert waits[-1] > SHORT_WAIT_S


def test_a_limit_counts_from_the_first_failure() -> None:
    patience = Patience(1.0, random.Random(0))
    assert patience.next_wait_s(100.0) is not None
    last = patience.next_wait_s(100.95)
    assert last is not None
    assert last <= 0.05 + 1e-9
    assert patience.next_wait_s(101.0) is None


def test_progress_starts_it_anew() -> None:
    patience = Patience(1.0, random.Random(0))
    patience.next_wait_s(100.0)
    patience.progressed()
    wait = patience.next_wait_s(200.0)
    assert wait is not None
    assert wait <= FIRST_WAIT_S


def test_no_patience_at_all_is_one_attempt() -> None:
    assert Patience(0.0, random.Random(0)).next_wait_s(5.0) is None
