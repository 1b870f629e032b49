"""A table small enough to see through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from scripts.experiment_plan import Cell, TablePlan
from scripts.experiment_table import Table, load_table
from tests.scripts.bench import Bench
from tests.scripts.tables import Document, tiny_table, unmeasured


@pytest.fixture
def document() -> Document:
    return tiny_table()


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., Path]:
    """Writes a table file: `write_table(document, name="tiny")`."""

    def write(document: Document, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def table(document: Document, write_table: Callable[..., Path]) -> Table:
    return load_table(write_table(document))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("scripts.experiment_runner.POLL_S", 0.01)
    return Bench(tmp_path)


@pytest.fixture
def two(table: Table) -> list[Cell]:
    """The grid of the dense row."""
    return TablePlan(table, "", unmeasured).cells()[:2]
