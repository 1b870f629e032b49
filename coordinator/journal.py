"""The durable side of the state: one SQLite file a run, one transaction a decision, one coordinator at a time.

Rows are stored as JSON by table and key; metrics are appended. A run directory carries a format number and a lock file.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from coordinator.state import Best, Claim, Conduct, Holder, Module, Row, Shard, Stage, Standing, Task
from protocol.tasks import BlobRef, Checkpoint, ModuleRef

# Stands in a backup until it is whole for the first time.
UNFINISHED_BACKUP = "backup.unfinished"
FORMAT = 3
# Formats whose rows are read as they are; the first change to such a run makes it one of the newest format.
READABLE = (1, 2, FORMAT)
_ROW_TYPES: dict[str, type[Row]] = {row.table: row for row in (Stage, Task, Module, Shard, Best, Standing, Conduct)}


class RunUnusable(ValueError):
    """A run directory that cannot be opened: another format, locked, or not a run."""


class RunLock:
    """Holds RUN/lock for as long as the process lives; the system lets go of it when the process dies."""

    def __init__(self, run_dir: Path) -> None:
        self._file: IO[str] = open(run_dir / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (held open on purpose)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise RunUnusable(
                f"run directory {run_dir} is locked by another coordinator (process {holder}); stop that one first"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class Journal:
    """Rows and metrics of one run in RUN/state.db."""

    def __init__(self, run_dir: Path, *, read_only: bool = False) -> None:
        """Open (or create) the journal; raises RunUnusable where the file is of another format or missing to read."""
        self._path = path = run_dir / "state.db"
        if read_only and not path.is_file():
            if (run_dir / UNFINISHED_BACKUP).exists():
                raise RunUnusable(f"{run_dir} is a backup that did not come to its end; give its `dipaco backup` again")
            raise RunUnusable(f"{run_dir} is not a run directory: it holds no state.db")
        self._connection = sqlite3.connect(
            f"file:{path}{'?mode=ro' if read_only else ''}", uri=True, isolation_level=None, check_same_thread=False
        )
        try:
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise RunUnusable(f"{path} is not readable as a run's state: {error}") from None
        if not read_only:
            self._check_whole(path)
        if version == 0 and not read_only:
            self._create()
        elif version not in READABLE:
            raise RunUnusable(
                f"run directory {run_dir} has format {version}, this version of dipaco reads format {FORMAT}; "
                "use the version that made it, or another --run-dir"
            )
        if not read_only:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
        self._is_older = version not in (0, FORMAT)

    def _check_whole(self, path: Path) -> None:
        try:
            found = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            found = str(error)
        if found != "ok":
            self._connection.close()
            raise RunUnusable(_damaged(path, found.splitlines()[-1]))

    def _create(self) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.executescript(
            f"""
            BEGIN;
            CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE rows (kind TEXT NOT NULL, key TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, key));
            CREATE TABLE metrics (id INTEGER PRIMARY KEY, task_id TEXT NOT NULL UNIQUE, body TEXT NOT NULL);
            PRAGMA user_version={FORMAT};
            COMMIT;
            """
        )

    def commit(self, rows: Iterable[Row], metrics: Iterable[dict[str, Any]] = ()) -> None:
        """Store rows and metrics in one transaction: all of them, or (raising) none."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT (kind, key) DO UPDATE SET body = excluded.body",
                [(row.table, row.key, _encode(row)) for row in rows],
            )
            connection.executemany(
                "INSERT INTO metrics (task_id, body) VALUES (?, ?)",
                [(metric["task_id"], json.dumps(metric)) for metric in metrics],
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done within, or (raising) none of it; the format becomes the newest with the first change."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            if self._is_older:
                connection.execute(f"PRAGMA user_version={FORMAT}")
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._is_older = False

    def rows(self) -> Iterator[Row]:
        """All rows, in the order in which they were first stored."""
        with self._whole():
            for kind, body in self._connection.execute("SELECT kind, body FROM rows ORDER BY rowid"):
                yield _decode(kind, json.loads(body))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """One record a completed task, in the order of completion."""
        with self._whole():
            for (body,) in self._connection.execute("SELECT body FROM metrics ORDER BY id"):
                yield json.loads(body)

    def has_metric(self, task_id: str) -> bool:
        """Whether the task was completed."""
        found = self._connection.execute("SELECT 1 FROM metrics WHERE task_id = ?", (task_id,)).fetchone()
        return found is not None

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """RunUnusable instead of what a damaged file makes of a read."""
        try:
            yield
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
            raise RunUnusable(_damaged(self._path, str(error))) from None

    def meta(self, key: str) -> str | None:
        with self._whole():
            found = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def set_meta(self, **values: str | None) -> None:
        """Note these, and forget those that are None, in one transaction."""
        with self._transaction() as connection:
            for key, value in values.items():
                if value is None:
                    connection.execute("DELETE FROM meta WHERE key = ?", (key,))
                else:
                    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def close(self) -> None:
        self._connection.close()


def copy_journal(run_dir: Path, into: Path) -> None:
    """Copy the journal of a run that may go on, as it stands between two decisions, in one file without a WAL."""
    with (
        closing(sqlite3.connect(f"file:{run_dir / 'state.db'}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(into / "state.db", isolation_level=None)) as copy,
    ):
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")


def mark_copy(path: Path, key: str, value: str) -> None:
    """Note something in a copied journal, without making it one that is written to."""
    with closing(sqlite3.connect(path, isolation_level=None)) as copy:
        copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def fold(path: Path) -> None:
    """Bring what stands beside a database (its WAL) into it, so that the one file is all of it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=DELETE")


def _damaged(path: Path, why: str) -> str:
    return (
        f"{path} is damaged ({why}); go on from a backup of the run (`dipaco backup` makes them), or start anew in "
        "another --run-dir"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, BlobRef):
        return [value.digest, value.size]
    if isinstance(value, Checkpoint | ModuleRef):
        return value.model_dump(mode="json")
    if isinstance(value, Claim):
        return _parts(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _encode(row: Row) -> str:
    return json.dumps(_parts(row), separators=(",", ":"))


def _parts(record: Row | Claim) -> dict[str, Any]:
    return {part.name: _plain(getattr(record, part.name)) for part in fields(record)}


def _blob(pair: list[Any] | None) -> BlobRef | None:
    return None if pair is None else BlobRef(digest=pair[0], size=pair[1])


def _blobs(pairs: dict[str, Any]) -> dict[str, BlobRef]:
    return {name: BlobRef(digest=pair[0], size=pair[1]) for name, pair in pairs.items()}


def _claim(body: dict[str, Any]) -> Claim:
    return Claim(**{**body, "outputs": _blobs(body["outputs"])})


def _decode(kind: str, body: dict[str, Any]) -> Row:
    row_type = _ROW_TYPES[kind]
    for name in ("params", "momentum", "manifest", "inner_state"):
        if name in body:
            body[name] = _blob(body[name])
    for name in ("history", "files"):
        if name in body:
            body[name] = tuple(_blob(pair) for pair in body[name])
    if "modules" in body:
        body["modules"] = tuple(ModuleRef.model_validate(module) for module in body["modules"])
    if body.get("checkpoint"):
        body["checkpoint"] = Checkpoint.model_validate(body["checkpoint"])
    if "outputs" in body:
        body["outputs"] = _blobs(body["outputs"])
    if "claims" in body:
        body["claims"] = tuple(_claim(claim) for claim in body["claims"])
    if "holders" in body:
        body["holders"] = tuple(Holder(*pair) for pair in body["holders"])
    for name in ("after", "failures", "suspected"):
        if name in body:
            body[name] = tuple(body[name])
    return row_type(**body)
