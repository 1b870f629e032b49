"""Carries out cells by the commands a person would give: `dipaco run`, then `dipaco evaluate` for each split.

Whatever ends it, no finished step is lost: a run continues where it was, and an evaluation is begun again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dipaco.progress import duration
from scripts.experiment_plan import Cell
from scripts.experiment_work import Work, environment

ROOT = Path(__file__).resolve().parent.parent
DIPACO = (sys.executable, "-m", "dipaco")
POLL_S = 0.2
SAY_S = 60.0
_LAST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Hands:
    """How cells are carried out: `at_once` cells, each with `workers`, started in the folder `data`."""

    workers: int = 2
    at_once: int = 1
    data: Path | None = None
    program: Sequence[str] = DIPACO


@dataclass(slots=True)
class CellRun:
    """One cell on its way; `left` are the steps to do, the first one of them now."""

    cell: Cell
    work: Work
    hands: Hands
    describe: Callable[[Path], dict[str, Any]]
    left: list[str]
    fresh: bool
    began_s: float = field(default_factory=time.monotonic)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the next step, in a session of its own: Ctrl-C reaches only who started this."""
        folder, step = self.work.folder(self.cell.digest), self.left[0]
        if step == "run":
            words = ["run", str(self.work.prepare(self.cell)), "--workers", str(self.hands.workers)]
            words += ["--run-dir", str(self.work.run_dir(self.cell))]
        else:
            words = ["evaluate", str(self.work.run_dir(self.cell)), "--split", step]
            words += [word for route in self.cell.routes for word in ("--route", route)]
        with open(folder / f"{step}.out", "wb") as written, open(folder / f"{step}.log", "ab") as log:
            self._process = subprocess.Popen(
                [*self.hands.program, *words, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=log,
                cwd=self.hands.data or ROOT,
                env=environment(ROOT),
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether the cell is over: go on to its next step, or not. Raises CellFailed."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return False
        step = self.left[0]
        if code != 0:
            raise CellFailed(f"{step} ended with code {code}: {self.last_words() or 'it said nothing'}")
        if step == "run":
            self.work.finished_run(self.cell, self.describe(self.work.run_dir(self.cell)))
        else:
            written = (self.work.folder(self.cell.digest) / f"{step}.out").read_text(encoding="utf-8")
            self.work.finished_split(self.cell, step, json.loads(written))
        del self.left[0]
        if self.left:
            self.start()
        return not self.left

    def last_words(self) -> str:
        """The last line that the step wrote, without the prefix of every command; empty where it wrote none."""
        log = self.work.folder(self.cell.digest) / f"{self.left[0]}.log"
        written = log.read_bytes()[-_LAST_BYTES:].decode(errors="replace") if log.is_file() else ""
        lines = [line.strip() for line in written.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("dipaco: ")]
        return (told or lines or [""])[-1].removeprefix("dipaco: ")

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Until its process is gone: a run hands its tasks back and closes its directory."""
        if self._process is not None:
            self._process.wait()


class CellFailed(ValueError):
    """A step of a cell ended badly; the message is what it said."""


@dataclass(slots=True)
class Outcome:
    """How a call ended: cells finished in it, what the others said, and whether it was stopped before the end."""

    finished: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def carry_out(
    cells_now: Callable[[], list[Cell]],
    work: Work,
    hands: Hands,
    describe: Callable[[Path], dict[str, Any]],
    must_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Outcome:
    """Run every cell that is not finished, as far as choices are made; `cells_now` is asked again after each."""
    outcome, pace = Outcome(), Pace(hands)
    running: list[CellRun] = []
    cells, said_s = cells_now(), time.monotonic()
    try:
        while not must_stop():
            open_cells = _open(cells, work, outcome, running)
            while open_cells and len(running) < hands.at_once:
                cell = open_cells.pop(0)
                run = CellRun(cell, work, hands, describe, work.left(cell), fresh=not work.begun(cell))
                place = 1 + next(index for index, each in enumerate(cells) if each.digest == cell.digest)
                say(f"cell {place} of {len(cells)}: {cell.name}; {pace.left(cells, work)}")
                run.start()
                running.append(run)
            if not running:
                return outcome
            time.sleep(POLL_S)
            if _gather(running, outcome, pace, say):
                cells = cells_now()
            if time.monotonic() - said_s >= SAY_S:
                said_s = time.monotonic()
                for run in running:
                    say(f"  {run.cell.name}, {run.left[0]} {run.last_words()}")
        outcome.stopped = True
        return outcome
    finally:
        for run in running:
            run.stop()
        for run in running:
            run.wait()


def _open(cells: list[Cell], work: Work, outcome: Outcome, running: list[CellRun]) -> list[Cell]:
    taken = {run.cell.digest for run in running} | outcome.failed.keys()
    return [cell for cell in cells if not cell.provisional and cell.digest not in taken and work.left(cell)]


def _gather(running: list[CellRun], outcome: Outcome, pace: Pace, say: Callable[[str], None]) -> bool:
    """Take out who is over; whether anybody was."""
    before = len(running)
    for run in list(running):
        try:
            if not run.ended():
                continue
            outcome.finished += 1
            wall_s = time.monotonic() - run.began_s
            if run.fresh:
                pace.add(run.cell, wall_s)
            say(f"finished {run.cell.name} in {duration(wall_s)}")
        except CellFailed as error:
            outcome.failed[run.cell.digest] = str(error)
            say(f"failed {run.cell.name}: {error}")
        running.remove(run)
    return len(running) < before


class Pace:
    """The time that is left, from the estimates of the cells and how long those of this call took."""

    def __init__(self, hands: Hands) -> None:
        self._hands, self._wall_s, self._core_s = hands, 0.0, 0.0

    def add(self, cell: Cell, wall_s: float) -> None:
        self._wall_s += wall_s
        self._core_s += cell.core_s

    def left(self, cells: list[Cell], work: Work) -> str:
        """In words; a cell counts as a whole until it is finished."""
        core_s = sum(cell.core_s for cell in cells if work.left(cell))
        wall_per_core_s = self._wall_s / self._core_s if self._core_s else 1.0 / self._hands.workers
        known = "" if self._core_s else ", by estimate"
        return f"about {duration(core_s * wall_per_core_s / self._hands.at_once)} left{known}"
