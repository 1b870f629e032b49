"""Outcomes of small histories that are counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dipaco.simulation import Record, summarise
from dipaco.simulation_page import draw, page

TASK = "train/TRAIN/0/0"


def event(wall_s: float, name: str, **facts: Any) -> Record:
    return {"wall_s": wall_s, "event": name, **facts}


def leased(wall_s: float, fence: int, worker: str, task_id: str = TASK) -> Record:
    kind = task_id.split("/")[1]
    return event(wall_s, "leased", task_id=task_id, fence=fence, worker=worker, kind=kind)


def completed(wall_s: float, fence: int, seconds: float, task_id: str = TASK) -> Record:
    return event(wall_s, "completed", task_id=task_id, fence=fence, steps=10, seconds=seconds)


def fault(wall_s: float, process: str, action: str) -> Record:
    return {"wall_s": wall_s, "at_s": wall_s - 100, "process": process, "action": action}


def metric(worker: str, wall_s: float, seconds: float, task_id: str = TASK) -> Record:
    return {"task_id": task_id, "kind": "TRAIN", "steps": 10, "worker": worker, "wall_s": wall_s, "seconds": seconds}


STARTS = [fault(100, "worker-0", "start"), fault(100, "worker-1", "start")]
JOINS = [event(101, "joined", worker="worker-0"), event(101, "joined", worker="worker-1")]
FACTS: dict[str, tuple[list[Record], list[Record], list[Record]]] = {
    "killed": (
        [
            *JOINS,
            event(101, "leasable", tasks=1),
            leased(102, 1, "worker-0"),
            event(102, "leasable", tasks=0),
            event(104, "progress", task_id=TASK, fence=1, steps=2),
            event(107, "leasable", tasks=1),
            leased(108, 2, "worker-1"),
            event(108, "leasable", tasks=0),
            completed(119, 2, seconds=10.0),
        ],
        [*STARTS, fault(106, "worker-0", "kill")],
        [metric("worker-1", 119, 10.0)],
    )
}


def test_a_kill_costs_the_steps_in_flight() -> None:
    outcome = summarise(*FACTS["killed"], 100.0, 120.0)
    # Two steps were reported at 104, and one a second (the speed of what was completed) goes on until the kill at 106.
    assert (outcome["steps_executed"], outcome["steps_in_weights"], outcome["steps_lost"]) == (14, 10, 4)
    assert outcome["goodput"] == pytest.approx(10 / 14)
    assert (outcome["worker_kills"], outcome["coordinator_kills"], outcome["tasks_retried"]) == (1, 0, 1)
    assert outcome["recovery_s"] == {"count": 1, "median": 2.0, "p99": 2.0, "max": 2.0}
    assert outcome["recovery_while_free_s"]["median"] == 2.0
    # worker-0 could work from 101 to 106 and computed 4 s; worker-1 from 101 to 102 and from 107 to 119: 10 s of 13.
    assert outcome["occupancy"] == pytest.approx(14 / 18)
    assert outcome["offer_s"]["max"] == 1.0
    assert outcome["participation"][0][1:] == [2.0, 0.0]
    assert outcome["participation"][-60][1:] == [1.0, 1.0]


def test_a_worker_that_was_slow_until_its_end_computed_all_the_while() -> None:
    """Steps are counted by reports; that they took three times as long as those of others is no idleness."""
    events, faults, metrics = FACTS["killed"]
    slow = [event(105.5, "progress", task_id=TASK, fence=1, steps=2) if e["event"] == "progress" else e for e in events]
    early = event(103, "progress", task_id=TASK, fence=1, steps=1)
    outcome = summarise([*slow[:4], early, *slow[4:]], faults, metrics, 100.0, 120.0)
    assert outcome["steps_executed"] == 10 + 2
    assert outcome["occupancy"] == pytest.approx(14 / 18)


def test_steps_taken_over_from_a_checkpoint_are_executed_once() -> None:
    events = [
        *JOINS,
        leased(102, 1, "worker-0"),
        event(104, "progress", task_id=TASK, fence=1, steps=1),
        event(106, "checkpoint", task_id=TASK, fence=1, steps=3),
        {**leased(109, 2, "worker-1"), "resumed": 3},
        event(111, "progress", task_id=TASK, fence=2, steps=4),
        completed(118, 2, seconds=7.0),
    ]
    resumed = {**metric("worker-1", 118, 10.0), "resumed_seconds": 3.0}
    outcome = summarise(events, [*STARTS, fault(107, "worker-0", "kill")], [resumed], 100.0, 120.0)
    # Three steps to the checkpoint, a fourth until the kill a second later (one a second), then the seven that lack.
    assert (outcome["steps_executed"], outcome["steps_in_weights"], outcome["steps_lost"]) == (11, 10, 1)


def test_a_worker_that_was_killed_before_its_first_step_executed_none() -> None:
    """Another lease took 3 s to its first step: a silent one that ended after 2 s had not begun."""
    events = [
        *JOINS,
        leased(102, 1, "worker-0"),
        leased(106, 2, "worker-1"),
        event(110, "progress", task_id=TASK, fence=2, steps=1),
        completed(119, 2, seconds=10.0),
    ]
    outcome = summarise(
        events, [*STARTS, fault(104, "worker-0", "kill")], [metric("worker-1", 119, 10.0)], 100.0, 120.0
    )
    assert outcome["steps_executed"] == 10


def test_a_task_that_the_journal_has_is_completed_though_the_log_lacks_it() -> None:
    events = [*JOINS, leased(102, 1, "worker-0"), event(104, "opened"), leased(105, 1, "worker-0", "x/TRAIN/0/0")]
    faults = [*STARTS, fault(103, "coordinator", "kill")]
    outcome = summarise(events, faults, [metric("worker-0", 103, 1.0)], 100.0, 110.0)
    assert outcome["steps_in_weights"] == 10
    assert outcome["recovery_s"]["count"] == 0
    assert outcome["coordinator_absence_s"]["max"] == 1.0


def test_a_hung_worker_is_neither_alive_nor_a_second_holder() -> None:
    events = [
        *JOINS,
        leased(102, 1, "worker-0"),
        leased(108, 2, "worker-1"),
        leased(112, 3, "worker-1"),
        completed(118, 3, seconds=5.0),
    ]
    faults = [
        *STARTS,
        fault(104, "worker-0", "stop"),
        fault(110, "worker-1", "kill"),
        fault(111, "worker-1", "start"),
        fault(119, "worker-0", "continue"),
    ]
    outcome = summarise([*events, event(111.5, "joined", worker="worker-1")], faults, [], 100.0, 120.0)
    assert outcome["hang_recovery_s"]["median"] == 4.0
    assert outcome["recovery_s"]["median"] == 2.0
    alive = {seconds: workers for seconds, workers, _ in outcome["participation"]}
    assert alive[5.0] == 1.0
    assert alive[10.5] == 0.0


def test_a_second_holder_goes_on_at_once() -> None:
    events = [*JOINS, leased(102, 1, "worker-0"), leased(103, 2, "worker-1"), completed(110, 2, seconds=7.0)]
    outcome = summarise(events, [*STARTS, fault(105, "worker-0", "kill")], [metric("worker-1", 110, 7.0)], 100.0, 120.0)
    assert outcome["recovery_s"]["median"] == 0.0
    assert outcome["tasks_retried"] == 1


def test_a_recovery_waits_for_a_worker_that_is_free() -> None:
    other = "train/TRAIN/0/1"
    events = [
        *JOINS,
        leased(102, 1, "worker-0"),
        leased(102, 1, "worker-1", other),
        completed(109, 1, seconds=7.0, task_id=other),
        leased(110, 2, "worker-1"),
    ]
    metrics = [metric("worker-1", 109, 7.0, other)]
    outcome = summarise(events, [*STARTS, fault(105, "worker-0", "kill")], metrics, 100.0, 120.0)
    assert outcome["recovery_s"]["median"] == 5.0
    assert outcome["recovery_while_free_s"]["median"] == 1.0


def test_the_second_of_two_holders_works_until_the_first_is_done() -> None:
    events = [*JOINS, leased(102, 1, "worker-0"), leased(108, 2, "worker-1"), completed(112, 1, seconds=10.0)]
    outcome = summarise(events, STARTS, [metric("worker-0", 112, 10.0)], 100.0, 120.0)
    assert outcome["steps_executed"] == 10 + 4


def test_a_run_in_which_nothing_happened_has_no_recoveries() -> None:
    outcome = summarise([], [], [], 100.0, 101.0)
    assert outcome["recovery_s"] == {"count": 0, "median": None, "p99": None, "max": None}
    assert (outcome["goodput"], outcome["steps_lost"]) == (1.0, 0)


def test_the_page_is_whole_and_links_to_nothing() -> None:
    pytest.importorskip("matplotlib")
    events, faults, metrics = FACTS["killed"]
    outcome = {"run": "a<b", **summarise(events, faults, metrics, 100.0, 120.0)}
    hit = [*faults, fault(107, "coordinator", "kill"), fault(108, "coordinator", "start")]
    picture = draw(events, hit, metrics, outcome["participation"], 100.0, 120.0)
    assert picture.startswith(b"\x89PNG")
    text = page(outcome, picture)
    assert "a&lt;b" in text
    assert "goodput" in text
    assert "http" not in text
    assert "matplotlib" in page(outcome, None)
