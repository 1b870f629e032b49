"""The driver on stand-ins for the processes, which do nothing until a file tells them to end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dipaco.faults import Action, Fault
from dipaco.processes import MAX_RESTARTS, CoordinatorEnded, LocalRun, WorkersEnded
from dipaco.progress import PlainLines
from dipaco.simulating import Simulation, read_facts

STAND_IN = """
import pathlib, sys, time
role, *arguments = sys.argv[1:]
name = arguments[arguments.index("--name") + 1] if "--name" in arguments else role
folder = pathlib.Path(__file__).parent
if role == "coordinator":
    print("listening on", arguments[arguments.index("--listen") + 1].replace(":0", ":4321"), flush=True)
while True:
    order = folder / ("end-" + name)
    if order.exists():
        print("dipaco: as ordered", flush=True)
        sys.exit(int(order.read_text()))
    time.sleep(0.01)
"""


class Stage:
    """A folder with the stand-in, orders to it, and a simulation of two workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        (folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")

    def order(self, name: str, code: int) -> None:
        (self.folder / f"end-{name}").write_text(str(code), encoding="utf-8")

    def run(self, plan: list[tuple[float, str, Action]], until: Callable[[list[dict[str, Any]]], bool]) -> LocalRun:
        """Carry out a plan; the coordinator ends well once `until` is true of what was done."""
        local = LocalRun(
            config=Path("x.yaml"),
            run_dir=self.folder / "run",
            num_workers=0,
            threads=1,
            worker_memory_bytes=1000,
            say=self.said.append,
            program=(sys.executable, str(self.folder / "stand_in.py")),
        )

        def ask(address: str) -> None:
            assert address == "127.0.0.1:4321"
            if until(self.done()):
                self.order("coordinator", 0)

        Simulation(local, [Fault(*each) for each in plan], 2).carry_out(PlainLines(), ask)
        return local

    def done(self) -> list[dict[str, Any]]:
        return read_facts(self.folder / "run")

    def actions(self) -> list[tuple[str, str]]:
        return [(fact["process"], fact["action"]) for fact in self.done()]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    assert threading.current_thread() is threading.main_thread()
    return Stage(tmp_path)


def test_every_fault_of_the_plan_is_carried_out_in_order(stage: Stage) -> None:
    plan: list[tuple[float, str, Action]] = [
        (0.0, "worker-0", "start"),
        (0.0, "worker-1", "start"),
        (0.2, "worker-0", "kill"),
        (0.3, "worker-1", "stop"),
        (0.4, "worker-0", "start"),
        (0.5, "worker-1", "continue"),
        (0.6, "coordinator", "kill"),
        (0.7, "coordinator", "start"),
        (0.8, "worker-1", "terminate"),
        (0.9, "worker-1", "start"),
    ]
    local = stage.run(plan, lambda done: len(done) == len(plan))
    assert stage.actions() == [(name, action) for _, name, action in plan]
    for fact, (at_s, _, _) in zip(stage.done(), plan, strict=True):
        assert fact["at_s"] == at_s
    assert local.coordinator.exit_code == 0
    assert all(worker.exit_code == -signal.SIGTERM for worker in local.workers)
    assert not stage.said


def test_what_hangs_is_killed_before_it_is_started_again(stage: Stage) -> None:
    plan: list[tuple[float, str, Action]] = [(0.0, "worker-0", "start"), (0.2, "worker-0", "stop")]
    plan += [(0.3, "worker-0", "start"), (0.4, "worker-0", "kill"), (0.5, "worker-1", "start")]
    stage.run(plan, lambda done: len(done) >= 6)
    assert stage.actions() == [
        *((name, action) for _, name, action in plan),
        ("worker-0", "start"),  # the plan left it dead
    ]


def test_a_fault_to_what_is_not_there_is_left_out(stage: Stage) -> None:
    plan: list[tuple[float, str, Action]] = [(0.0, "worker-0", "kill"), (0.1, "worker-0", "start")]
    plan += [(0.2, "worker-0", "start"), (0.3, "worker-1", "continue"), (0.4, "worker-1", "start")]
    stage.run(plan, lambda done: len(done) >= 2)
    assert stage.actions() == [("worker-0", "start"), ("worker-1", "start")]


def test_what_ends_unasked_is_started_again_and_noted(stage: Stage) -> None:
    stage.order("worker-0", 1)
    with pytest.raises(WorkersEnded, match="as ordered"):
        stage.run([(0.0, "worker-0", "start"), (0.0, "worker-1", "start")], lambda done: False)
    assert stage.actions().count(("worker-0", "ended")) == MAX_RESTARTS
    assert len(stage.said) == MAX_RESTARTS


def test_a_coordinator_that_refuses_ends_the_simulation(stage: Stage) -> None:
    stage.order("coordinator", 1)
    with pytest.raises(CoordinatorEnded, match="as ordered"):
        stage.run([(0.0, "worker-0", "start"), (0.0, "worker-1", "start")], lambda done: False)
