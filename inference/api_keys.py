"""The keys that a server admits: one a line of a file, which is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from pathlib import Path

from inference.request_errors import BadKey

SCHEME = "Bearer "
SHORTEST_KEY = 16
_LOOK_S = 1.0


class BadKeyFile(ValueError):
    """A file of API keys that cannot be read or holds none."""


def read_keys(path: Path) -> list[bytes]:
    """SHA-256 of every key; lines that are empty or begin with # hold none. Raises BadKeyFile."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadKeyFile(f"the file of API keys {path} cannot be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    short = [number for number, key in enumerate(keys, 1) if len(key) < SHORTEST_KEY]
    if short:
        raise BadKeyFile(f"key {short[0]} of {path} has fewer than {SHORTEST_KEY} characters; give a longer one")
    if not keys:
        raise BadKeyFile(f"{path} holds no API key; write one a line, {SHORTEST_KEY} characters or more")
    return [hashlib.sha256(key.encode()).digest() for key in keys]


class ApiKeys:
    """Checks the `authorization` of requests. A file that breaks while it is in use leaves the keys as they were."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._keys = read_keys(path)
        self._stamp = self._changed()
        self._look_at_s = clock() + _LOOK_S

    def check(self, authorization: str) -> None:
        """Raises BadKey."""
        self._follow_the_file()
        if not authorization:
            raise BadKey("this server asks for an API key: send it as `Authorization: Bearer KEY`")
        presented = hashlib.sha256(authorization.removeprefix(SCHEME).strip().encode()).digest()
        found = [hmac.compare_digest(presented, key) for key in self._keys]  # all of them: no early end to time
        if not (authorization.startswith(SCHEME) and any(found)):
            raise BadKey("the API key is not one of this server's")

    def _follow_the_file(self) -> None:
        if self._clock() < self._look_at_s:
            return
        self._look_at_s = self._clock() + _LOOK_S
        stamp = self._changed()
        if stamp == self._stamp:
            return
        try:
            self._keys, self._stamp = read_keys(self._path), stamp
        except BadKeyFile:
            self._stamp = stamp

    def _changed(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
