"""A place to carry out cells by a product that only pretends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.experiment_cell_run import Hands
from scripts.experiment_patience import Patience
from scripts.experiment_plan import Cell
from scripts.experiment_runner import Outcome, carry_out
from scripts.experiment_work import Work
from tests.scripts.tables import measured

PRODUCT = Path(__file__).with_name("pretended_product.py")


class Until(Patience):
    """Patience that ends with conditions in the place of signals."""

    def __init__(self, over: Callable[[], bool], gone: Callable[[], bool]) -> None:
        super().__init__()
        self._over, self._gone = over, gone

    def is_over(self) -> bool:
        return self._over()

    def is_gone(self) -> bool:
        return self._gone()


def _never() -> bool:
    return False


def _described(run_dir: Path) -> dict[str, Any]:
    del run_dir
    return dict(measured({}).run)


class Bench:
    """A work folder, a data folder, and a product that only pretends."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        self.work = Work(folder / "work")
        self.said: list[str] = []
        self.describe: Callable[[Path], dict[str, Any]] = _described

    def calls(self) -> list[list[str]]:
        path = self.data / "calls.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def carry_out(
        self,
        cells: Callable[[], list[Cell]],
        must_stop: Callable[[], bool] = _never,
        at_once: int = 1,
        must_end: Callable[[], bool] = _never,
    ) -> Outcome:
        hands = Hands(workers=3, at_once=at_once, data=self.data, program=(sys.executable, "-S", str(PRODUCT)))
        patience = Until(must_stop, must_end)
        with self.work.held():
            return carry_out(cells, self.work, hands, self.describe, patience, self.said.append)


def until(condition: Callable[[], bool], patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
