from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dipaco.ending import UNFINISHED
from dipaco.processes import MAX_RESTARTS, CoordinatorEnded, LocalRun, WorkersEnded

STAND_IN = """
import pathlib, sys, time
role, *arguments = sys.argv[1:]
folder = pathlib.Path(__file__).parent
print(role, *arguments, flush=True)
if role == "coordinator":
    refusal = folder / "refusal"
    if refusal.exists():
        print("dipaco: " + refusal.read_text(), file=sys.stderr)
        sys.exit(1)
    listen = arguments[arguments.index("--listen") + 1]
    print("run x in y, listening on", listen.replace(":0", ":4321"), flush=True)
while True:
    for name in (role, role + arguments[arguments.index("--name") + 1] if "--name" in arguments else role):
        order = folder / ("end-" + name)
        if order.exists():
            sys.exit(int(order.read_text()))
    time.sleep(0.01)
"""


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def local(tmp_path: Path, said: list[str]) -> LocalRun:
    """A local run whose programs are stand-ins that end with the code in the file end-<role>."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN, encoding="utf-8")
    return LocalRun(
        config=Path("x.yaml"),
        run_dir=tmp_path / "run",
        num_workers=2,
        threads=3,
        worker_memory_bytes=1000,
        say=said.append,
        program=(sys.executable, str(program)),
    )


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def order(local: LocalRun, name: str, text: str) -> None:
    (Path(local.program[1]).parent / name).write_text(text, encoding="utf-8")


def test_workers_are_given_the_address_the_coordinator_took(local: LocalRun) -> None:
    try:
        local.start()
        assert local.address == "127.0.0.1:4321"
        worker = local.workers[1]
        until(lambda: b"\n" in worker.written())
        words = worker.written().decode().split()
        assert words[:2] == ["worker", "127.0.0.1:4321"]
        assert words[words.index("--threads") + 1] == "3"
        assert words[words.index("--name") + 1] == "worker-1"
        assert words[words.index("--parent") + 1] == str(os.getpid())
        assert not local.watch()
    finally:
        local.stop()
    assert local.coordinator.exit_code == -signal.SIGTERM


def test_the_run_is_over_when_the_coordinator_ends_well(local: LocalRun) -> None:
    try:
        local.start()
        order(local, "end-coordinator", "0")
        until(local.watch)
    finally:
        local.stop()


def test_what_a_signal_took_away_comes_back_at_the_same_address(local: LocalRun, said: list[str]) -> None:
    try:
        local.start()
        for child in (local.coordinator, local.workers[0]):
            first = child.pid
            os.kill(first, signal.SIGKILL)
            until(lambda child=child: child.exit_code is not None)  # type: ignore[misc]
            assert not local.watch()
            assert child.pid != first
        until(lambda: b"listening on 127.0.0.1:4321" in local.coordinator.written())
    finally:
        local.stop()
    assert said == [
        f"coordinator was killed (signal 9); starting it again (1 of {MAX_RESTARTS})",
        f"worker-0 was killed (signal 9); starting it again (1 of {MAX_RESTARTS})",
    ]


def test_a_coordinator_that_refuses_is_quoted_and_not_started_again(local: LocalRun, said: list[str]) -> None:
    order(local, "refusal", "the run directory is locked")
    try:
        with pytest.raises(CoordinatorEnded, match=r"^the run directory is locked$"):
            local.start()
    finally:
        local.stop()
    assert not said


def test_a_coordinator_that_was_asked_to_stop_by_others_is_started_again(local: LocalRun, said: list[str]) -> None:
    try:
        local.start()
        order(local, "end-coordinator", str(UNFINISHED))
        until(lambda: local.coordinator.exit_code is not None)
        assert not local.watch()
    finally:
        local.stop()
    assert len(said) == 1


def test_workers_that_keep_ending_end_the_run(local: LocalRun) -> None:
    def over() -> bool:
        local.watch()
        return False

    try:
        local.start()
        order(local, "end-worker", "1")
        with pytest.raises(WorkersEnded):
            until(over)
    finally:
        local.stop()
    assert [worker.restarts for worker in local.workers] == [MAX_RESTARTS, MAX_RESTARTS]


def test_workers_that_leave_in_peace_are_left_alone(local: LocalRun, said: list[str]) -> None:
    try:
        local.start()
        order(local, "end-worker", "0")
        until(lambda: all(worker.exit_code == 0 for worker in local.workers))
        assert not local.watch()
    finally:
        local.stop()
    assert not said
