"""Carries out a run on this machine: starts its processes, shows what they do, stops them in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from configs.load import resume_difference
from configs.schema import Config
from coordinator.journal import RunUnusable
from coordinator.snapshot import RunSnapshot
from dipaco.ending import Refused
from dipaco.memory import PeakMemory
from dipaco.processes import LocalRun
from dipaco.progress import Display
from dipaco.usage import read_usage, write_usage

POLL_S = 1.0


class Stopped(KeyboardInterrupt):
    """The person (or the system) asked the run to stop."""


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped once; while things are put in order, another one changes nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(local: LocalRun, display: Display, ask: Callable[[str], dict[str, Any] | None]) -> None:
    """Run until finished. `ask` gives the status at an address, None while nobody answers.

    Raises Stopped, CoordinatorEnded, WorkersEnded; in every case the processes are gone, and the usage of a run that
    began is kept.
    """
    began = time.monotonic()
    memory = PeakMemory()
    try:
        with stopping_on_signals(), memory:
            try:
                local.start()
                _watch(local, display, ask)
            finally:
                local.stop()
    finally:
        if local.address:
            elapsed = time.monotonic() - began
            so_far = read_usage(local.run_dir)
            write_usage(local.run_dir, so_far.and_then(elapsed, memory.peak_bytes, local.num_workers))


def _watch(local: LocalRun, display: Display, ask: Callable[[str], dict[str, Any] | None]) -> None:
    with display:
        while not local.watch():
            status = ask(local.address)
            if status is not None:
                display.show(status)
            time.sleep(POLL_S)


def is_finished(run_dir: Path, config: Config) -> bool:
    """Whether the run in this directory has come to its end; raises Refused where it was another experiment."""
    if not (run_dir / "state.db").is_file():
        return False
    try:
        snapshot = RunSnapshot.open(run_dir)
    except RunUnusable:
        return False  # its coordinator has the word on that
    difference = resume_difference(snapshot.config, config)
    if difference is not None:
        raise Refused(
            f"{run_dir} holds a run with another {difference}; restore the key, or take another --run-dir for this one"
        )
    return bool(snapshot.state.standing.finished)
