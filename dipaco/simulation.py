"""What a run under faults came to, from facts: the coordinator's event log, the faults carried out, the journal.

Pure. An inner step counts as executed when its worker reported it, or would have by the time of the fault at the median
speed of completed tasks (and, before its first report, after the median time that a lease takes to its first step):
reports come only with heartbeats and checkpoints. Goodput = inner steps in the weights / executed. Occupancy
= seconds computing / seconds in which a ready worker (from its hello to its end) held a task or one was leasable.
Recovery = from a fault to the next lease of the task it took away; `while_free`: only the seconds of it in which a
ready worker held nothing, since a task cannot run again before there is one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dipaco.faults import COORDINATOR
from dipaco.intervals import Intervals, difference, intersection, measure, union

Record = dict[str, Any]
BINS = 120
ENDINGS = ("kill", "ended")


@dataclass(slots=True)
class HeldTask:
    """One lease: wall times, the step its worker came to (after the `resumed` ones), and how it ended."""

    task_id: str
    fence: int
    worker: str
    kind: str
    begin_s: float
    resumed: int = 0
    reported: tuple[float, int] = (0.0, 0)
    first_report: tuple[float, int] | None = None
    end_s: float = 0.0
    outcome: str = "lost"
    seconds: float = 0.0
    executed: int = 0


def held_tasks(
    events: Iterable[Record], faults: Sequence[Record], metrics: Iterable[Record], ended_s: float
) -> list[HeldTask]:
    """All leases in the order of their grants; one that nobody ended was lost when its worker was, or moved on.

    The journal has the word on what was completed: a killed coordinator may not have come to note it.
    """
    found: dict[tuple[str, int], HeldTask] = {}
    moves: dict[str, list[float]] = {}
    for event in events:
        key = (event.get("task_id", ""), event.get("fence", 0))
        held = found.get(key)
        at_s, name = event["wall_s"], event["event"]
        if name == "leased" and held is None:
            resumed = event.get("resumed", 0)
            found[key] = HeldTask(*key, event["worker"], event["kind"], at_s, resumed, (at_s, resumed))
            moves.setdefault(event["worker"], []).append(at_s)
        elif name in ("progress", "checkpoint") and held is not None:
            if held.first_report is None and event["steps"] > held.resumed:
                held.first_report = (at_s, event["steps"])
            held.reported = (at_s, max(held.reported[1], event["steps"]))
        elif name == "completed" and held is not None:
            held.reported = (at_s, event["steps"])
            held.end_s, held.outcome, held.seconds = at_s, "completed", event["seconds"]
        elif name == "released" and held is not None and not held.end_s:
            held.end_s, held.outcome = at_s, "released"
    noted = {held.task_id for held in found.values() if held.outcome == "completed"}
    for metric in metrics:
        grants = [h for h in found.values() if h.task_id == metric["task_id"] and h.worker == metric["worker"]]
        if metric["task_id"] not in noted and grants:
            held = max(grants, key=lambda each: each.fence)
            held.reported = (metric["wall_s"], metric["steps"])
            held.seconds = metric["seconds"] - metric.get("resumed_seconds", 0.0)
            held.end_s, held.outcome = metric["wall_s"], "completed"
    deaths = [(fault["process"], fault["wall_s"]) for fault in faults if fault["action"] in ENDINGS]
    completions = {held.task_id: held.end_s for held in found.values() if held.outcome == "completed"}
    for held in found.values():
        if not held.end_s:
            ends = [completions.get(held.task_id, ended_s)]  # its worker is told so with the next heartbeat
            ends += [at_s for worker, at_s in deaths if worker == held.worker and at_s > held.begin_s]
            ends += [at_s for at_s in moves[held.worker] if at_s > held.begin_s]
            held.end_s = max(held.begin_s, min(ends))
    return list(found.values())


def count_steps(tasks: Sequence[HeldTask], faults: Sequence[Record]) -> int:
    """Inner steps executed, also noted in every lease, with the `seconds` of those that were not completed."""
    for held in tasks:
        if held.outcome != "completed":
            held.seconds = held.end_s - held.begin_s
    training = [held for held in tasks if held.kind == "TRAIN"]
    completed = [held for held in training if held.outcome == "completed"]
    step_s = _median([held.seconds / max(1, held.reported[1] - held.resumed) for held in completed]) or 1.0
    starts = [(held.begin_s, held.resumed, *held.first_report) for held in training if held.first_report]
    starting_s = _median([max(0.0, at - begin - (steps - old) * step_s) for begin, old, at, steps in starts]) or 0.0
    most = max((held.reported[1] for held in completed), default=0)
    stopped = [(fault["process"], fault["wall_s"]) for fault in faults if fault["action"] == "stop"]
    for held in training:
        steps = held.reported[1]
        if held.outcome != "completed":
            hung_s = [at_s for worker, at_s in stopped if worker == held.worker and at_s > held.begin_s]
            until_s = min([*hung_s, held.end_s])
            unreported_s = max(0.0, until_s - held.reported[0] - (0.0 if held.first_report else starting_s))
            steps = max(steps, min(most, steps + round(unreported_s / step_s)))
            held.seconds = _computing_s(held, until_s, steps, most, step_s)
        held.executed = steps - held.resumed
    return sum(held.executed for held in training)


def _computing_s(held: HeldTask, until_s: float, steps: int, most: int, step_s: float) -> float:
    """Seconds that a lost lease computed until its worker ended or hung: steps follow one another without a pause.

    Where nothing was reported, as long as the steps take at the median speed.
    """
    if held.first_report is None:
        return min(held.end_s - held.begin_s, (steps - held.resumed) * step_s)
    first_s, first_steps = held.first_report
    since_s = max(held.begin_s, first_s - (first_steps - held.resumed) * step_s)
    last_s, last_steps = held.reported
    return max(0.0, min(until_s, last_s + max(0, most - last_steps) * step_s) - since_s)


def up_times(events: Iterable[Record], faults: Sequence[Record], ended_s: float) -> tuple[dict[str, Intervals], ...]:
    """By worker: when its process lived (and did not hang), and since when it was ready (from its hello)."""
    alive: dict[str, Intervals] = {}
    ready: dict[str, Intervals] = {}
    hung: dict[str, Intervals] = {}
    joins = [(event["worker"], event["wall_s"]) for event in events if event["event"] == "joined"]
    for worker in sorted({fault["process"] for fault in faults} - {COORDINATOR}):
        own = [fault for fault in faults if fault["process"] == worker]
        for index, fault in enumerate(own):
            after = own[index + 1 :]
            if fault["action"] == "start":
                end_s = next((each["wall_s"] for each in after if each["action"] in (*ENDINGS, "start")), ended_s)
                alive.setdefault(worker, []).append((fault["wall_s"], end_s))
            if fault["action"] == "stop":
                end_s = next((each["wall_s"] for each in after), ended_s)
                hung.setdefault(worker, []).append((fault["wall_s"], end_s))
        lives = difference(union(alive.get(worker, [])), union(hung.get(worker, [])))
        since = [
            (joined_s, end_s)
            for begin_s, end_s in union(alive.get(worker, []))
            for name, joined_s in joins
            if name == worker and begin_s <= joined_s < end_s
        ]
        alive[worker], ready[worker] = lives, intersection(union(since), lives)
    return alive, ready


def leasable_times(events: Iterable[Record], ended_s: float) -> Intervals:
    """When some task waited for a worker."""
    looks = [(event["wall_s"], event["tasks"]) for event in events if event["event"] == "leasable"]
    spans = pairwise([*looks, (ended_s, 0)])
    return union((at_s, end_s) for (at_s, tasks), (end_s, _) in spans if tasks)


def recoveries(
    tasks: Sequence[HeldTask], faults: Sequence[Record], action: str, alive: dict[str, Intervals]
) -> Intervals:
    """For every fault of this kind that took a task away: from when until when nobody had the task.

    Empty where a living worker held the task, too.
    """
    found: Intervals = []
    for fault in faults:
        if fault["action"] != action:
            continue
        at_s = fault["wall_s"]
        for held in tasks:
            if held.worker != fault["process"] or not held.begin_s <= at_s <= held.end_s or held.outcome == "completed":
                continue
            others = [other for other in tasks if other.task_id == held.task_id and other.fence != held.fence]
            if any(other.begin_s <= at_s < other.end_s and _covers(alive[other.worker], at_s) for other in others):
                found.append((at_s, at_s))
            else:
                found += sorted((at_s, other.begin_s) for other in others if other.begin_s > at_s)[:1]
    return found


def coordinator_absences(events: Iterable[Record], faults: Sequence[Record]) -> list[float]:
    """Seconds from each end of the coordinator until it was at work again."""
    opened = [event["wall_s"] for event in events if event["event"] == "opened"]
    ends = [fault["wall_s"] for fault in faults if fault["process"] == COORDINATOR and fault["action"] in ENDINGS]
    return [next((at_s for at_s in opened if at_s > end_s), end_s) - end_s for end_s in ends]


def summarise(
    events: Sequence[Record], faults: Sequence[Record], metrics: Sequence[Record], began_s: float, ended_s: float
) -> Record:
    """The measured part of simulation.json; `participation` holds [seconds, workers alive, workers with a task]."""
    tasks = held_tasks(events, faults, metrics, ended_s)
    executed = count_steps(tasks, faults)
    in_weights = sum(metric["steps"] for metric in metrics if metric["kind"] == "TRAIN")
    alive, ready = up_times(events, faults, ended_s)
    leasable = leasable_times(events, ended_s)
    holding = {worker: union((h.begin_s, h.end_s) for h in tasks if h.worker == worker) for worker in ready}
    could = {worker: intersection(ready[worker], union([*holding[worker], *leasable])) for worker in ready}
    waited = [
        end_s - begin_s
        for worker in ready
        for begin_s, end_s in intersection(difference(ready[worker], holding[worker]), leasable)
    ]
    free = union(moment for worker in ready for moment in difference(ready[worker], holding[worker]))
    gaps = recoveries(tasks, faults, "kill", alive)
    possible_s = sum(measure(each) for each in could.values())
    busy_s = sum(min(held.seconds, _ready_s(held, ready)) for held in tasks)
    return {
        **_counts(faults),
        "tasks_retried": len(tasks) - len({held.task_id for held in tasks}),
        "steps_executed": executed,
        "steps_in_weights": in_weights,
        "steps_lost": executed - in_weights,
        "goodput": in_weights / executed if executed else 1.0,
        "occupancy": min(1.0, busy_s / possible_s) if possible_s else 1.0,
        "recovery_s": _spread([end_s - begin_s for begin_s, end_s in gaps]),
        "recovery_while_free_s": _spread([measure(intersection([gap], free)) for gap in gaps]),
        "hang_recovery_s": _spread([end - begin for begin, end in recoveries(tasks, faults, "stop", alive)]),
        "coordinator_absence_s": _spread(coordinator_absences(events, faults)),
        "offer_s": _spread(waited),
        "wall_s": ended_s - began_s,
        "participation": participation(alive, holding, began_s, ended_s),
    }


def _covers(intervals: Intervals, at_s: float) -> bool:
    return any(begin_s <= at_s < end_s for begin_s, end_s in intervals)


def _ready_s(held: HeldTask, ready: dict[str, Intervals]) -> float:
    return measure(intersection([(held.begin_s, held.end_s)], ready.get(held.worker, [])))


def _counts(faults: Sequence[Record]) -> Record:
    def count(action: str, *, coordinator: bool = False) -> int:
        return sum(f["action"] == action and (f["process"] == COORDINATOR) == coordinator for f in faults)

    return {
        "worker_kills": count("kill"),
        "worker_stops": count("stop"),
        "worker_terminations": count("terminate"),
        "coordinator_kills": count("kill", coordinator=True),
        "unplanned_ends": count("ended") + count("ended", coordinator=True),
    }


def participation(
    alive: dict[str, Intervals], holding: dict[str, Intervals], began_s: float, ended_s: float
) -> list[list[float]]:
    """Mean numbers of workers alive and of workers with a task, over equal parts of the run."""
    width = max((ended_s - began_s) / BINS, 1e-9)
    bins = [(began_s + index * width, began_s + (index + 1) * width) for index in range(BINS)]
    return [
        [round(begin - began_s, 3)]
        + [
            round(sum(measure(intersection([(begin, end)], each)) for each in of.values()) / width, 3)
            for of in (alive, {worker: intersection(alive[worker], holding[worker]) for worker in alive})
        ]
        for begin, end in bins
    ]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: Sequence[float]) -> Record:
    """Count, median, 99th percentile (nearest rank) and largest; None where there is no value."""
    ordered = sorted(values)
    p99 = ordered[max(0, -(-99 * len(ordered) // 100) - 1)] if ordered else None
    return {"count": len(ordered), "median": _median(ordered), "p99": p99, "max": ordered[-1] if ordered else None}
