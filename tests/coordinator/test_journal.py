"""The journal: all of a decision or none of it, every kind of row as it was, one coordinator a run."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.journal import FORMAT, Journal, RunLock, RunUnusable
from coordinator.state import Best, Claim, Conduct, Holder, Module, Row, Shard, Stage, Standing, Task
from protocol.tasks import BlobRef, ModuleRef

BLOB = BlobRef(digest="a" * 64, size=7)
OTHER = BlobRef(digest="b" * 64, size=8)
ROWS: list[Row] = [
    Stage("train", "train", "mixture", ("shard", "corpus"), "running", 2, "class", 1.5, 0.0, {"x": [1, "y"]}),
    Task("t/TRAIN/0/1", "t", "TRAIN", 0, "1", failures=("a: b",), outputs={"0.1": BLOB}, result={"tokens": 3}),
    Task(
        "t/TRAIN/1/1",
        "t",
        "TRAIN",
        1,
        "1",
        claims=(Claim("ann", "ann", "class", 3, {"0.1": BLOB}, {"0.1": 0.5}, {"tokens": 3}, 1.5, "far above"),),
        audited=True,
    ),
    Module("mixture", "0.1", 3, BLOB, OTHER, (OTHER, BLOB)),
    Module("mixture", "0.2", 0, BLOB),
    Shard("mixture", 1, 0, (BLOB, OTHER), 10, 2, OTHER, 1, 50, 50, BLOB),
    Best(2, 1, (ModuleRef(module_id="0.1", version=2, blob=BLOB),), 12.5, 4),
    Best(3),
    Standing("a reason", True, {"modules": 5}),
    Conduct("ann", ("t/TRAIN/0/1",), "its result differs", 2.5),
]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit(ROWS, [{"task_id": "t", "tokens": 3}])
    journal.close()
    again = Journal(tmp_path)
    assert list(again.rows()) == ROWS
    assert list(again.metrics()) == [{"task_id": "t", "tokens": 3}]
    assert again.has_metric("t")
    assert not again.has_metric("u")


def test_a_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit([Module("base", "0.0", 0, BLOB)])
    journal.commit([Module("base", "0.0", 1, OTHER, BLOB)])
    assert list(journal.rows()) == [Module("base", "0.0", 1, OTHER, BLOB)]


def test_a_failed_decision_leaves_nothing(tmp_path: Path) -> None:
    """A task that is counted twice is a bug: the whole decision is refused, rows included."""
    journal = Journal(tmp_path)
    journal.commit([], [{"task_id": "t"}])
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit(ROWS, [{"task_id": "t"}])
    assert list(journal.rows()) == []


def test_another_format_is_named(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(RunUnusable, match="has format 99, this version of dipaco reads format 3"):
        Journal(tmp_path)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """Its tasks hold no claims: their columns did not exist."""
    Journal(tmp_path).close()
    old = '{"task_id":"t","stage":"s","kind":"PACK","phase":0,"subject":"0","holders":[["w",1]],"outputs":{}}'
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("PRAGMA user_version=1")
        connection.execute("INSERT INTO rows VALUES ('tasks', 't', ?)", (old,))
    connection.close()
    return tmp_path


def format_of(run_dir: Path) -> int:
    with closing(sqlite3.connect(run_dir / "state.db")) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_a_run_of_the_format_before_is_read_as_it_is(old_run: Path) -> None:
    for read_only in (True, False):
        journal = Journal(old_run, read_only=read_only)
        assert list(journal.rows()) == [Task("t", "s", "PACK", 0, "0", holders=(Holder("w", 1),))]
        journal.close()
        assert format_of(old_run) == 1


@pytest.mark.parametrize(
    "change",
    [lambda journal: journal.commit(ROWS), lambda journal: journal.set_meta(config="{}")],
    ids=["rows", "meta"],
)
def test_the_first_change_makes_it_one_of_this_format(old_run: Path, change: Callable[[Journal], None]) -> None:
    journal = Journal(old_run)
    change(journal)
    journal.close()
    assert format_of(old_run) == FORMAT


def test_a_change_that_fails_leaves_the_format_too(old_run: Path) -> None:
    journal = Journal(old_run)
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit([], [{"task_id": "t"}, {"task_id": "t"}])
    assert format_of(old_run) == 1
    journal.commit([], [{"task_id": "t"}])
    journal.close()
    assert format_of(old_run) == FORMAT


def test_notes_are_kept_and_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.set_meta(backup="x", config="y")
    journal.set_meta(backup=None, config="z")
    assert (journal.meta("backup"), journal.meta("config")) == (None, "z")
    with pytest.raises(sqlite3.ProgrammingError):
        journal.set_meta(config="lost", numerics=object())  # type: ignore[arg-type]
    assert journal.meta("config") == "z"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"hello" * 1000)
    with pytest.raises(RunUnusable, match="not readable as a run's state"):
        Journal(tmp_path)


def test_reading_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunUnusable, match=r"holds no state\.db"):
        Journal(tmp_path, read_only=True)


def test_a_second_coordinator_is_refused(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    code = (
        "import sys; from pathlib import Path; from coordinator.journal import RunLock, RunUnusable\n"
        "try: RunLock(Path(sys.argv[1]))\n"
        "except RunUnusable as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "locked by another coordinator" in refused.stdout
    lock.release()
    free = subprocess.run(command, capture_output=True, text=True, check=True)
    assert free.stdout == ""
