"""What one side shows to a coordinator: a join file whose token may be replaced while the run goes on.

A new token comes with the answer to a call, or stands in the file when the old one is refused. It is kept in the file
where that can be written, so that a worker that is started again has it. Threads may share one object.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from pathlib import Path

from protocol.expiry import check_join_file
from protocol.joinfile import BadJoinFile, JoinFile
from protocol.keyfile import write_key_file


class Credentials:
    """A join file in use. `path` is where it was read from (None: in memory only); `say` is told what changes."""

    def __init__(self, join: JoinFile, path: Path | None = None, say: Callable[[str], None] = lambda _: None) -> None:
        self._join = join
        self._path = path
        self._say = say
        self._lock = threading.Lock()

    @classmethod
    def read(cls, path: Path, say: Callable[[str], None] = lambda _: None) -> Credentials:
        """Those of the join file at `path`; says what is near its end. Raises BadJoinFile, CertificateEnded."""
        join = JoinFile.read(path)
        for remark in check_join_file(join, datetime.datetime.now(datetime.UTC)):
            say(remark)
        return cls(join, path, say)

    @property
    def join(self) -> JoinFile:
        return self._join

    @property
    def token(self) -> str:
        return self._join.token

    def renew(self, token: str) -> None:
        """Take over the token that the coordinator handed out; the file gets it too where it has the old one."""
        with self._lock:
            before = self._join.token
            if token == before:
                return
            self._join = self._join.model_copy(update={"token": token})
            self._say(f"the run has a new join token{self._kept(before, token)}")

    def _kept(self, before: str, token: str) -> str:
        if self._path is None:
            return ""
        try:
            on_file = JoinFile.read(self._path)
            if on_file.token == before:
                renewed = on_file.model_copy(update={"token": token})
                write_key_file(self._path.resolve(), renewed.to_json().encode(), private=True)
            return f"; it stands in {self._path}"
        except (BadJoinFile, OSError) as error:
            return f", known until this process ends: {self._path} keeps the old one ({error})"

    def renewed_since(self, token: str) -> bool:
        """Whether there is another token than this one, which was refused: known by now, or in the file."""
        with self._lock:
            if self._join.token != token:
                return True
            if self._path is None:
                return False
            try:
                on_file = JoinFile.read(self._path)
            except BadJoinFile:
                return False
            if on_file.token == token:
                return False
            self._join = self._join.model_copy(update={"token": on_file.token})
            self._say(f"the join token was refused; going on with the new one in {self._path}")
            return True
