"""One cell on its way: the commands of its steps one after the other, what they leave behind, how they are ended."""

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

from dipaco.usage import hardware
from scripts.experiment_cost import TEST
from scripts.experiment_measurement import UNREADABLE, no_number
from scripts.experiment_plan import Cell
from scripts.experiment_work import CLOZE, Work, environment

ROOT = Path(__file__).resolve().parent.parent
DIPACO = (sys.executable, "-m", "dipaco")
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
            words += ["--run-dir", str(self.work.run_dir(self.cell)), "--reuse", str(self.work.reuse)]
        elif step == CLOZE:
            assert self.cell.cloze is not None
            words = ["cloze", str(self.work.run_dir(self.cell)), *self.cell.cloze.words(TEST, self.cell.routes)]
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
        """Whether the cell is over: go on to its next step, or not. Raises CellFailed and CameToNoNumber."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return False
        step = self.left[0]
        if code != 0:
            self._check_the_number(step)
            raise CellFailed(f"{step} ended with code {code}: {self.last_words() or 'it said nothing'}")
        if step == "run":
            self.work.finished_run(self.cell, self._described())
        elif step == CLOZE:
            self.work.finished_cloze(self.cell, self._written(step))
        else:
            self.work.finished_split(self.cell, step, self._written(step))
        del self.left[0]
        if self.left:
            self.start()
        return not self.left

    def _check_the_number(self, step: str) -> None:
        """Raises CameToNoNumber, and keeps it, where the run paused because its training diverged."""
        reason = no_number(self.work.run_dir(self.cell)) if step == "run" else ""
        if reason:
            self.work.came_to_no_number(self.cell, reason, hardware())
            raise CameToNoNumber(reason)

    def _described(self) -> dict[str, Any]:
        try:
            return self.describe(self.work.run_dir(self.cell))
        except UNREADABLE as error:
            raise CellFailed(f"what the run left cannot be read: {error}") from None

    def _written(self, step: str) -> dict[str, Any]:
        file = self.work.folder(self.cell.digest) / f"{step}.out"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except UNREADABLE as error:
            raise CellFailed(f"what {step} wrote cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise CellFailed(f"what {step} wrote is no JSON object: {file}")
        return found

    def last_words(self) -> str:
        """The last line that the step wrote, without the prefix of every command; empty where it wrote none."""
        log = self.work.folder(self.cell.digest) / f"{self.left[0]}.log"
        written = log.read_bytes()[-_LAST_BYTES:].decode(errors="replace") if log.is_file() else ""
        lines = [line.strip() for line in written.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("dipaco: ")]
        return (told or lines or [""])[-1].removeprefix("dipaco: ")

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ask it to end in order: a run hands its tasks back and closes its directory."""
        self._send(signal.SIGINT)

    def end(self) -> None:
        """Ask again, by the signal that a command which hangs may still hear."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it. What it had started itself leaves without it (dipaco/parent.py)."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and self.is_alive():
            self._process.send_signal(number)


class CellFailed(ValueError):
    """A step of a cell ended badly; the message is what it said."""


class CameToNoNumber(ValueError):
    """The training of a cell diverged, as it would again; the message is the step that was not finite."""
