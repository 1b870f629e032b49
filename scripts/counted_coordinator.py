"""Coordinators whose durable effects are numbered, and which are killed just before or after one of them.

`python -m scripts.counted_coordinator` imports everything once, then reads one JSON order a line: it forks a
coordinator for it and answers first with its process id, then with its exit code. The product knows nothing of this.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

When = Literal["before", "after"]

# What a coordinator imports late, imported before the first fork, so that a restart takes milliseconds.
LATE_IMPORTS = ("corpus.builder", "corpus.token_file", "model.initial", "routing.kmeans", "routing.sharding")
# Workers on the same machine are back sooner than the product expects of those far away.
FAREWELL_S = 3.0


@dataclass(frozen=True, slots=True)
class Order:
    """One life of a coordinator: where, and at which effect (from 1) it is to be killed, if at all."""

    run_dir: str
    port: int
    effects: str
    stop_at: int = 0
    when: When = "before"

    def to_line(self) -> str:
        return json.dumps(asdict(self))


class Effects:
    """Numbers and lists the durable effects of this process: fsync, rename, removal and what SQLite makes durable."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._root = order.run_dir
        self._lock = threading.Lock()
        self._number = 0
        self._synced: set[tuple[int, int]] = set()
        self._listed = os.open(order.effects, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    @contextlib.contextmanager
    def one(self, what: str) -> Iterator[None]:
        """Around one effect; where it is the chosen one, the process ends here by SIGKILL."""
        with self._lock:
            self._number += 1
            number = self._number
            os.write(self._listed, f"{what.replace(self._root, 'RUN')}\n".encode())
        self._kill_at(number, "before")
        yield
        self._kill_at(number, "after")

    def _kill_at(self, number: int, when: When) -> None:
        if number == self._order.stop_at and when == self._order.when:
            os.kill(os.getpid(), signal.SIGKILL)

    def synced(self, descriptor: int) -> None:
        """A file's bytes are on the disk."""
        status = os.fstat(descriptor)
        self._synced.add((status.st_dev, status.st_ino))

    def mark_of(self, path: Any) -> str:
        """A word of warning where a file is given its name before its bytes were made durable."""
        status = os.stat(path)
        return "" if (status.st_dev, status.st_ino) in self._synced else " UNSYNCED"


def count(effects: Effects) -> None:
    """Let the calls of this process through which anything becomes durable be counted."""
    fsync, replace, unlink, connect = os.fsync, os.replace, os.unlink, sqlite3.connect

    def counted_fsync(descriptor: int) -> None:
        with effects.one(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}"):
            fsync(descriptor)
        effects.synced(descriptor)

    def counted_replace(source: Any, target: Any, **more: Any) -> None:
        with effects.one(f"rename {source} {target}{effects.mark_of(source)}"):
            replace(source, target, **more)

    def counted_unlink(path: Any, **more: Any) -> None:
        with effects.one(f"remove {path}"):
            unlink(path, **more)

    class CountedConnection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if not self._makes_durable(sql):
                return super().execute(sql, *values)
            with effects.one(f"sqlite {sql.split()[0]}"):
                return super().execute(sql, *values)

        def executescript(self, script: str) -> sqlite3.Cursor:
            with effects.one("sqlite script"):
                return super().executescript(script)

        def _makes_durable(self, sql: str) -> bool:
            word = sql.split()[0].upper()
            alone = word in ("INSERT", "UPDATE", "DELETE", "REPLACE") and not self.in_transaction
            return word == "COMMIT" or alone or "journal_mode" in sql

    def counted_connect(*arguments: Any, **more: Any) -> Any:
        return connect(*arguments, **{"factory": CountedConnection, **more})

    counted = {
        "replace": counted_replace,
        "rename": counted_replace,
        "unlink": counted_unlink,
        "remove": counted_unlink,
    }
    for name, call in {"fsync": counted_fsync, **counted}.items():
        setattr(os, name, call)
    sqlite3.connect = counted_connect


def _serve(order: Order, serve: Callable[..., None], load_config: Callable[[Path], Any]) -> None:
    """One life of a coordinator, in a process of its own; never returns."""
    code = 1
    try:
        run_dir = Path(order.run_dir)
        log = os.open(run_dir.parent / f"{run_dir.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        count(Effects(order))
        config = load_config(run_dir.parent / "config.json")
        serve(config, run_dir, f"127.0.0.1:{order.port}", say=lambda line: print(line, flush=True))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """Fork a coordinator for every order on standard input, one at a time."""
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    from configs.schema import Config
    from coordinator import coordinator
    from coordinator.serving import serve

    coordinator.FAREWELL_S = FAREWELL_S

    def load_config(path: Path) -> Config:
        return Config.model_validate_json(path.read_text(encoding="utf-8"))

    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if child == 0:
            _serve(order, serve, load_config)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
