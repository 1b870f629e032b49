"""The keys that a server admits: one a line of a file, which is read again when it changes.

A file that can be read rules, whatever it holds: keys that are not in it any more are not admitted. Where it cannot be
read, the keys read last hold for `UNREAD_S`, and nobody is admitted after that.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inference.request_errors import BadKey

logger = logging.getLogger(__name__)

SCHEME = "Bearer "
SHORTEST_KEY = 16
UNREAD_S = 60.0
_LOOK_S = 1.0
_BOM = b"\xef\xbb\xbf"


class BadKeyFile(ValueError):
    """A file of API keys that cannot be read, holds none, or has lines that are no keys."""


@dataclass(frozen=True, slots=True)
class KeyLines:
    """SHA-256 of every key in a file, and what is wrong with the lines that are none."""

    keys: tuple[bytes, ...]
    wrong: tuple[str, ...] = ()


def key_lines(data: bytes) -> KeyLines:
    """What the bytes of a file hold; lines that are empty or begin with #, after any spaces, hold nothing."""
    keys, wrong = [], []
    for number, line in enumerate(data.removeprefix(_BOM).splitlines(), 1):
        key = line.strip()
        if not key or key.startswith(b"#"):
            continue
        if len(key) < SHORTEST_KEY:
            wrong.append(f"the key in line {number} has fewer than {SHORTEST_KEY} characters; give a longer one")
        elif not all(0x21 <= byte < 0x7F for byte in key):
            wrong.append(f"the key in line {number} holds spaces or characters beyond ASCII; give one without")
        else:
            keys.append(hashlib.sha256(key).digest())
    return KeyLines(tuple(keys), tuple(wrong))


def read_keys(path: Path) -> tuple[bytes, ...]:
    """SHA-256 of every key of a file that is in order; raises BadKeyFile."""
    try:
        found = key_lines(path.read_bytes())
    except OSError as error:
        raise BadKeyFile(f"the file of API keys {path} cannot be read: {error}") from None
    if found.wrong:
        raise BadKeyFile(f"{path}: {found.wrong[0]}")
    if not found.keys:
        raise BadKeyFile(f"{path} holds no API key; write one a line, {SHORTEST_KEY} characters or more")
    return found.keys


class ApiKeys:
    """Checks the `authorization` of requests. What is wrong with the file while it is in use is logged, once."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises BadKeyFile."""
        self._path, self._clock = path, clock
        self._stamp = self._changed()
        self._keys = read_keys(path)
        self._look_at_s = clock() + _LOOK_S
        self._unread_since_s: float | None = None

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
        now_s = self._clock()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + _LOOK_S
        stamp = self._changed()
        if stamp is not None and stamp == self._stamp:
            return
        try:
            found = key_lines(self._path.read_bytes())
        except OSError as error:
            self._stamp = None  # look again, whether it changes or not
            self._go_on_unread(now_s, error)
            return
        self._keys, self._stamp, self._unread_since_s = found.keys, stamp, None
        for wrong in found.wrong:
            logger.warning("%s: %s; the other keys hold", self._path, wrong)
        if not found.keys:
            logger.warning("%s holds no API key any more: nobody is admitted until it does", self._path)

    def _go_on_unread(self, now_s: float, error: OSError) -> None:
        """Keep the keys for a while."""
        if self._unread_since_s is None:
            self._unread_since_s = now_s
            logger.warning(
                "the file of API keys cannot be read (%s): its last keys hold for %.0f s, then nobody is admitted",
                error,
                UNREAD_S,
            )
        elif now_s - self._unread_since_s >= UNREAD_S and self._keys:
            self._keys = ()
            logger.error("the file of API keys cannot be read (%s): nobody is admitted until it can", error)

    def _changed(self) -> tuple[int, int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size
