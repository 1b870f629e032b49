"""Carries out cells by the commands a person would give: `dipaco run`, then `dipaco evaluate` and `dipaco cloze`.

Whatever ends it, no finished step is lost: a run continues where it was, and an evaluation is begun again. A cell that
fails is tried again by the next call; one whose training diverged is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dipaco.progress import duration
from scripts.experiment_cell_run import CameToNoNumber, CellFailed, CellRun, Hands
from scripts.experiment_patience import Patience
from scripts.experiment_plan import Cell
from scripts.experiment_work import Work

POLL_S = 0.2
SAY_S = 60.0
KILL_S = 10.0
"""How long a command that was asked to end a second time has to do so."""


@dataclass(slots=True)
class Outcome:
    """How a call ended: cells finished in it, those that came to no number and that failed, by digest with what they
    said, and whether it was stopped before the end."""

    finished: int = 0
    no_number: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def carry_out(
    cells_now: Callable[[], list[Cell]],
    work: Work,
    hands: Hands,
    describe: Callable[[Path], dict[str, Any]],
    patience: Patience,
    say: Callable[[str], None],
) -> Outcome:
    """Run every cell that is not finished, as far as choices are made; `cells_now` is asked again after each."""
    outcome, pace = Outcome(), Pace(hands)
    running: list[CellRun] = []
    cells, said_s = cells_now(), time.monotonic()
    try:
        while not patience.is_over():
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
        _end(running, patience, say)


def _end(running: list[CellRun], patience: Patience, say: Callable[[str], None]) -> None:
    """Until the processes of all cells are gone: in order, or when that is waited for no longer, by force."""
    if running:
        say(f"stopping {len(running)} cells in order; a second Ctrl-C ends them")
    for run in running:
        run.stop()
    ending_s: float | None = None
    while any(run.is_alive() for run in running):
        if ending_s is None and patience.is_gone():
            ending_s = time.monotonic()
            for run in running:
                run.end()
        if ending_s is not None and time.monotonic() - ending_s >= KILL_S:
            for run in running:
                run.kill()
        time.sleep(POLL_S)


def _open(cells: list[Cell], work: Work, outcome: Outcome, running: list[CellRun]) -> list[Cell]:
    taken = {run.cell.digest for run in running} | outcome.failed.keys() | outcome.no_number.keys()
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
        except CameToNoNumber as error:
            outcome.no_number[run.cell.digest] = str(error)
            say(f"no number from {run.cell.name}, which is not tried again: {error}")
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
        core_s = sum(map(work.core_s_left, cells))
        wall_per_core_s = self._wall_s / self._core_s if self._core_s else 1.0 / self._hands.workers
        known = "" if self._core_s else ", by estimate"
        return f"about {duration(core_s * wall_per_core_s / self._hands.at_once)} left{known}"
