"""Fault plans: which process of a local run is killed, stopped, asked to leave or started, and when. Pure and seeded.

A plan is a list of faults in the order of their times; workers are down until their first `start`, the coordinator is
up. Either times between faults are exponential and a worker is away for a fixed time, or a trace gives the number of
workers alive over time and the seed picks which.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Action = Literal["start", "kill", "stop", "continue", "terminate", "drop", "part", "heal"]
# What is done to a worker's link to the coordinator, not to its process: dipaco/network.py.
NETWORK_ACTIONS = ("drop", "part", "heal")
COORDINATOR = "coordinator"
HORIZON_S = 6 * 3600.0
COORDINATOR_RESTART_S = 1.0
HANG_S = 15.0


class MalformedPlan(ValueError):
    """A fault specification, trace or plan that says nothing clear."""


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """At `at_s` seconds into the run, do something to a process."""

    at_s: float
    process: str
    action: Action


def worker_name(worker_index: int) -> str:
    """The name of a worker process of a local run."""
    return f"worker-{worker_index}"


@dataclass(frozen=True, slots=True)
class Poisson:
    """Every worker fails after an exponential time of mean `mtbf_s` and is back `restart_s` later.

    Shares of the faults: `stop` hangs the process (SIGSTOP) for HANG_S instead, `term` asks it to leave (SIGTERM) and
    kills it when it is started again.
    """

    mtbf_s: float
    restart_s: float
    stop: float = 0.0
    term: float = 0.0

    def faults(self, num_workers: int, seed: int) -> list[Fault]:
        found: list[Fault] = []
        for worker_index in range(num_workers):
            found += self._of_worker(worker_name(worker_index), random.Random(f"{seed}/{worker_index}"))
        return sorted(found)

    def _of_worker(self, name: str, source: random.Random) -> Iterator[Fault]:
        at_s = 0.0
        yield Fault(at_s, name, "start")
        while (at_s := at_s + source.expovariate(1 / self.mtbf_s)) < HORIZON_S:
            kind = source.random()
            if kind < self.stop:
                yield Fault(at_s, name, "stop")
                at_s += HANG_S
                yield Fault(at_s, name, "continue")
                continue
            yield Fault(at_s, name, "terminate" if kind < self.stop + self.term else "kill")
            at_s += self.restart_s
            yield Fault(at_s, name, "start")


@dataclass(frozen=True, slots=True)
class Trace:
    """(seconds, alive) steps; the number of workers follows them, `speedup` times as fast, times `scale`.

    Leading zeroes are cut. After the end of the trace all workers are alive, so that the run comes to its end.
    """

    steps: tuple[tuple[float, int], ...]
    speedup: float = 1.0
    scale: float = 1.0

    def faults(self, num_workers: int, seed: int) -> list[Fault]:
        source = random.Random(seed)
        found: list[Fault] = []
        alive: list[str] = []
        dead = [worker_name(worker_index) for worker_index in range(num_workers)]
        for at_s, wanted in self.levels(num_workers):
            while len(alive) > wanted:
                dead.append(alive.pop(source.randrange(len(alive))))
                found.append(Fault(at_s, dead[-1], "kill"))
            while len(alive) < wanted:
                alive.append(dead.pop(source.randrange(len(dead))))
                found.append(Fault(at_s, alive[-1], "start"))
        return found

    def levels(self, num_workers: int) -> list[tuple[float, int]]:
        """Seconds into the run and workers alive from then on."""
        wanted = {  # several rows of one moment: the last one counts
            at_s: min(num_workers, math.floor(alive * self.scale + 0.5)) for at_s, alive in self.steps
        }
        from_s = min((at_s for at_s, alive in wanted.items() if alive > 0), default=None)
        if from_s is None:
            raise MalformedPlan("the trace never has an instance alive; take another, or a larger scale")
        levels = [((at_s - from_s) / self.speedup, wanted[at_s]) for at_s in sorted(wanted) if at_s >= from_s]
        return [*levels, (levels[-1][0] + 1.0, num_workers)]


def parse_trace(text: str, *, speedup: float = 1.0, scale: float = 1.0) -> Trace:
    """A trace from CSV `seconds,alive` without a header; raises MalformedPlan."""
    steps = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            seconds, alive = line.split(",")
            steps.append((float(seconds), int(alive)))
        except ValueError:
            raise MalformedPlan(f"line {number} of the trace is {line!r}; expected `seconds,alive`") from None
        if steps[-1][1] < 0 or not math.isfinite(steps[-1][0]) or steps[-1][0] < (steps[-2][0] if steps[1:] else 0.0):
            raise MalformedPlan(f"line {number} of the trace is {line!r}; times must not fall, counts not be negative")
    return Trace(tuple(steps), speedup, scale)


def coordinator_faults(mtbf_s: float, seed: int) -> list[Fault]:
    """The coordinator is killed after exponential times of mean `mtbf_s` and started again a second later."""
    source = random.Random(f"{seed}/{COORDINATOR}")
    found, at_s = [], 0.0
    while (at_s := at_s + source.expovariate(1 / mtbf_s)) < HORIZON_S:
        found.append(Fault(at_s, COORDINATOR, "kill"))
        at_s += COORDINATOR_RESTART_S
        found.append(Fault(at_s, COORDINATOR, "start"))
    return found


def write_plan(faults: Iterable[Fault]) -> str:
    """The text of a plan: one JSON object a line."""
    return "".join(json.dumps(asdict(fault)) + "\n" for fault in faults)


def parse_plan(text: str, num_workers: int) -> list[Fault]:
    """The faults of a plan; raises MalformedPlan where a line is none or names a process that the run has not."""
    names = {COORDINATOR, *(worker_name(worker_index) for worker_index in range(num_workers))}
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            fault = Fault(**json.loads(line))
            right = math.isfinite(fault.at_s) and fault.at_s >= 0 and fault.action in get_args(Action)
        except (TypeError, ValueError):
            right = False
        if not right:
            raise MalformedPlan(
                f'line {number} of the plan is {line!r}; expected {{"at_s": 1.5, "process": "worker-0", "action": '
                f'"kill"}} with an action of {", ".join(get_args(Action))}'
            )
        if fault.process not in names:
            raise MalformedPlan(f"line {number} of the plan names {fault.process!r}; this run has {sorted(names)}")
        found.append(fault)
    return sorted(found, key=lambda fault: fault.at_s)


def parse_options(text: str, defaults: Mapping[str, float | None]) -> dict[str, float]:
    """`mtbf=60,restart=10` as positive numbers; None marks what must be given. Raises MalformedPlan."""
    given: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise MalformedPlan(f"--preempt has no option {name!r}; there are {', '.join(defaults)}")
        try:
            given[name] = float(value)
        except ValueError:
            raise MalformedPlan(f"--preempt: {name} is {value!r}, expected a number") from None
        if not (math.isfinite(given[name]) and given[name] >= 0) or (given[name] == 0 and defaults[name] != 0.0):
            raise MalformedPlan(f"--preempt: {name} is {value}, expected a number above 0")
    merged = {name: given.get(name, default) for name, default in defaults.items()}
    missing = [name for name, value in merged.items() if value is None]
    if missing:
        raise MalformedPlan(f"--preempt needs {missing[0]}=, such as poisson:mtbf=60,restart=10")
    return {name: value for name, value in merged.items() if value is not None}


def poisson(text: str) -> Poisson:
    """From `mtbf=60,restart=10[,stop=SHARE][,term=SHARE]`; raises MalformedPlan."""
    options = parse_options(text, {"mtbf": None, "restart": None, "stop": 0.0, "term": 0.0})
    if options["stop"] + options["term"] > 1:
        raise MalformedPlan(f"--preempt: stop and term are shares of the faults and add up to at most 1, not {text!r}")
    return Poisson(options["mtbf"], options["restart"], options["stop"], options["term"])


def kills(faults: Sequence[Fault], *, coordinator: bool) -> list[float]:
    """The times at which workers (or the coordinator) lose their process: by SIGKILL, SIGTERM or, hung, its use."""
    return [
        fault.at_s
        for fault in faults
        if fault.action in ("kill", "terminate", "stop") and (fault.process == COORDINATOR) == coordinator
    ]
