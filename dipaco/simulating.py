"""Carries out a run on this machine under a fault plan: real processes that get real signals.

With a network every worker talks to the coordinator through a relay of its own. A shell: which fault comes when is in
dipaco/faults.py and dipaco/network.py, what came of it in dipaco/simulation.py. Every fault is written to
RUN/faults.jsonl as it is carried out, with the time at which it was.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from dipaco.ending import UNFINISHED
from dipaco.faults import COORDINATOR, NETWORK_ACTIONS, Fault, worker_name
from dipaco.network import Conditions
from dipaco.processes import MAX_RESTARTS, Child, CoordinatorEnded, LocalRun, WorkersEnded
from dipaco.progress import Display
from dipaco.relay import Counts, Relays
from dipaco.running import stopping_on_signals

FAULTS = "faults.jsonl"
POLL_S = 0.03
STATUS_PERIOD_S = 0.3
Ask = Callable[[str], dict[str, Any] | None]


class Simulation:
    """One disturbed run. `local` has no workers of its own: the plan starts them."""

    def __init__(
        self, local: LocalRun, plan: Sequence[Fault], num_workers: int, conditions: Conditions | None = None
    ) -> None:
        assert local.num_workers == 0, "the plan starts the workers"
        self._local, self._num_workers = local, num_workers
        self._due = deque(plan)
        self._down = {worker_name(index) for index in range(num_workers)}
        self._hung: set[str] = set()
        self._leaving: set[str] = set()
        self._began_s = 0.0
        self._children: dict[str, Child] = {}
        self._counts: Counter[str] = Counter()
        self._conditions = conditions
        self._relays: Relays | None = None
        self._parted: set[str] = set()
        self.network = Counts()

    def carry_out(self, display: Display, ask: Ask) -> tuple[float, float]:
        """Run until finished; returns wall times of the beginning and of the end.

        Raises Stopped, CoordinatorEnded and WorkersEnded; in every case the processes are gone.
        """
        with stopping_on_signals():
            try:
                self._local.start()
                with self._linked() as addresses:
                    self._children = {COORDINATOR: self._local.coordinator}
                    for index, address in enumerate(addresses):
                        self._children[worker_name(index)] = self._local.add_worker(address)
                    self._began_s = time.time()
                    with (self._local.run_dir / FAULTS).open("a", encoding="utf-8", buffering=1) as facts, display:
                        return self._began_s, self._until_finished(facts, display, ask)
            finally:
                self._end()

    @contextmanager
    def _linked(self) -> Iterator[list[str]]:
        """Where each worker finds the coordinator: behind its relay, where there is a network."""
        if self._conditions is None or not self._local.address:
            yield [self._local.address] * self._num_workers
            return
        network, seed = self._conditions.network, self._conditions.seed
        with Relays(self._local.address, network, seed, self._num_workers) as self._relays:
            try:
                yield self._relays.addresses
            finally:
                self.network = self._relays.counts()

    def _until_finished(self, facts: IO[str], display: Display, ask: Ask) -> float:
        """Returns when the run was finished; from then on there are no faults, until the coordinator has ended."""
        asked_s, finished_s = 0.0, 0.0
        while self._local.coordinator.exit_code != 0:
            if not finished_s:
                self._carry_out_due(facts)
            self._mend(facts)
            if time.time() >= asked_s + STATUS_PERIOD_S and COORDINATOR not in self._down:
                asked_s = time.time()
                status = ask(self._local.address)
                if status is not None:
                    display.show({**status, "faults": self._remark()})
                    if status["finished"] and not finished_s:
                        finished_s = time.time()
                        self._heal_all()
            time.sleep(POLL_S)
        return finished_s or time.time()

    def _remark(self) -> str:
        up = self._num_workers - len((self._down | self._hung | self._leaving) - {COORDINATOR})
        return f"{up}/{self._num_workers} workers alive, killed: {self._counts['worker']} workers, " + (
            f"{self._counts[COORDINATOR]} coordinators{self._network_remark()}"
        )

    def _network_remark(self) -> str:
        if self._conditions is None or self._relays is None:
            return ""
        counts, cut_off = self._relays.counts(), ", ".join(sorted(self._parted))
        spec = self._conditions.network.spec
        return f", network {spec or 'as planned'}: {counts.drops} drops, {counts.partitions} partitions" + (
            f" ({cut_off} cut off)" if cut_off else ""
        )

    # --- faults -----------------------------------------------------------------------------------------------------

    def _carry_out_due(self, facts: IO[str]) -> None:
        while self._due and self._due[0].at_s <= time.time() - self._began_s:
            fault = self._due.popleft()
            if self._carry_out(fault):
                _note(facts, asdict(fault))
        if not self._due and self._down:
            for name in sorted(self._down):  # after the plan's end everything lives, so that the run ends
                self._due.append(Fault(time.time() - self._began_s, name, "start"))

    def _carry_out(self, fault: Fault) -> bool:
        """Whether there was a process to do it to."""
        if fault.action in NETWORK_ACTIONS:
            return self._disturb(fault)
        name, child = fault.process, self._children[fault.process]
        alive = name not in self._down and child.exit_code is None
        match fault.action:
            case "start":
                return self._start(name, child, alive)
            case "kill" if alive:
                child.kill()
                self._forget(name)
                self._down.add(name)
                self._counts[COORDINATOR if name == COORDINATOR else "worker"] += 1
                return True
            case "terminate" if alive and name not in self._leaving:
                os.kill(child.pid, signal.SIGTERM)
                self._leaving.add(name)
                return True
            case "stop" if alive and name not in self._hung:
                os.kill(child.pid, signal.SIGSTOP)
                self._hung.add(name)
                return True
            case "continue" if alive and name in self._hung:
                os.kill(child.pid, signal.SIGCONT)
                self._hung.discard(name)
                return True
        return False

    def _disturb(self, fault: Fault) -> bool:
        """Whether the worker has a link to do it to; a partition does not begin, or end, twice."""
        if self._relays is None or (fault.action, fault.process in self._parted) in (("part", True), ("heal", False)):
            return False
        index = self._local.workers.index(self._children[fault.process])
        match fault.action:
            case "drop":
                self._relays.drop(index)
            case "part":
                self._relays.part(index)
                self._parted.add(fault.process)
            case "heal":
                self._relays.heal(index)
                self._parted.discard(fault.process)
        return True

    def _heal_all(self) -> None:
        """The run is over: whoever is cut off is to hear of it."""
        for name in sorted(self._parted):
            self._disturb(Fault(0.0, name, "heal"))

    def _start(self, name: str, child: Child, alive: bool) -> bool:
        """Start what is down; what hangs or was asked to leave has no time left and is killed before."""
        if alive and name not in self._hung | self._leaving:
            return False
        if alive:
            child.kill()
        self._forget(name)
        self._down.discard(name)
        child.start()
        return True

    def _forget(self, name: str) -> None:
        self._hung.discard(name)
        self._leaving.discard(name)

    # --- what nobody planned ----------------------------------------------------------------------------------------

    def _mend(self, facts: IO[str]) -> None:
        """Start again what ended without a fault, a few times; raises what a run without faults would."""
        for name, child in self._children.items():
            if name in self._down | self._leaving or not child.exit_code:
                continue
            refused = name == COORDINATOR and child.exit_code > 0 and child.exit_code != UNFINISHED
            if refused or child.restarts >= MAX_RESTARTS:
                raise (CoordinatorEnded if name == COORDINATOR else WorkersEnded)(child.last_words())
            at_s = time.time() - self._began_s
            _note(facts, {"at_s": at_s, "process": name, "action": "ended"})
            self._local.say(f"{name} ended unasked ({child.last_words()}); starting it again")
            child.restarts += 1
            child.start()
            _note(facts, {"at_s": at_s, "process": name, "action": "start"})

    def _end(self) -> None:
        for name in self._hung:
            child = self._children[name]
            if child.exit_code is None:
                os.kill(child.pid, signal.SIGCONT)
        self._local.stop()


def _note(facts: IO[str], fault: dict[str, Any]) -> None:
    facts.write(json.dumps({"wall_s": time.time(), **fault}) + "\n")


def read_facts(run_dir: Path) -> list[dict[str, Any]]:
    """What was done to which process, in order: `wall_s`, `at_s` (as planned), `process`, `action` (or `ended`)."""
    lines: Iterable[str] = (run_dir / FAULTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
