"""The heartbeat carries the latest progress, tells of a lost lease and outlives silence."""

from __future__ import annotations

import threading

from protocol.errors import Unavailable
from worker.client import Pulse
from worker.heartbeat import Heartbeat


def test_carries_progress_until_the_lease_is_lost() -> None:
    beats: list[tuple[int, float, int]] = []
    second = threading.Event()

    def beat(steps: int, loss: float, tokens: int) -> Pulse:
        beats.append((steps, loss, tokens))
        if steps == 3:
            second.set()
        return Pulse(lost=steps == 3, lease_s=1.0)

    with Heartbeat(beat, 0.001, (Unavailable,), print) as heartbeat:
        heartbeat.report(3, 1.5, 60)
        assert heartbeat.lost.wait(20)
    assert second.is_set()
    assert beats[-1] == (3, 1.5, 60)
    assert [steps for steps, _, _ in beats].count(3) == 1  # nothing to extend any more


def test_goes_on_while_nobody_answers_and_says_so_once() -> None:
    said: list[str] = []
    answered = threading.Event()
    calls = 0

    def beat(steps: int, loss: float, tokens: int) -> Pulse:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise Unavailable("nobody at 127.0.0.1:1")
        answered.set()
        return Pulse(lost=False, lease_s=1.0)

    with Heartbeat(beat, 0.001, (Unavailable,), said.append) as heartbeat:
        assert answered.wait(20)
    assert not heartbeat.lost.is_set()
    assert len(said) == 1
    assert "nobody at 127.0.0.1:1" in said[0]


def test_the_first_step_is_told_at_once() -> None:
    """When a task has come to its steps is seen by it, not an interval later."""
    told = threading.Event()

    def beat(steps: int, loss: float, tokens: int) -> Pulse:
        assert steps == 1
        told.set()
        return Pulse(lost=False, lease_s=1.0)

    with Heartbeat(beat, 3600.0, (Unavailable,), print) as heartbeat:
        heartbeat.report(1, 1.5, 60)
        assert told.wait(20)
