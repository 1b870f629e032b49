"""A blob on its way here: PATH.part grows, across attempts and restarts, and becomes PATH once its SHA-256 is right."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from protocol.errors import CorruptBlob, DiskFull, Unavailable

_READ_BYTES = 1024 * 1024


@contextmanager
def _room(path: Path) -> Iterator[None]:
    """DiskFull instead of the system's error where there is no space."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space is left for {path}") from None
        raise


class Download:
    """Appends and hashes what arrives. `offset`: bytes held; `received_bytes`: those of them that came this time.

    `resumed` tells whether bytes of an earlier time are among them. Two downloads to one path at once are a bug.
    """

    def __init__(self, digest: str, path: Path) -> None:
        self.digest = digest
        self.received_bytes = 0
        self._path = path
        self._part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self._part.open("a+b")
        self._hash = hashlib.sha256()
        self._total: int | None = None
        self.offset = 0
        self._file.seek(0)
        while data := self._file.read(_READ_BYTES):
            self._hash.update(data)
            self.offset += len(data)
        self.resumed = self.offset > 0

    def append(self, data: bytes, total_bytes: int) -> None:
        """Keep the next bytes; `total_bytes` is 0 in all but the first message. Raises CorruptBlob, DiskFull."""
        if self._total is None or total_bytes:
            self._total = total_bytes
        if self.offset + len(data) > self._total:
            raise CorruptBlob(f"blob {self.digest} goes on after its {self._total} bytes")
        with _room(self._path):
            self._file.write(data)
        self._hash.update(data)
        self.offset += len(data)
        self.received_bytes += len(data)

    def finish(self) -> None:
        """Move the file into its place. Raises CorruptBlob (all bytes are dropped), Unavailable (some are missing)."""
        if self.offset != self._total:
            raise Unavailable(f"blob {self.digest} ended after {self.offset} of {self._total} bytes")
        if self._hash.hexdigest() != self.digest:
            self._drop()
            raise CorruptBlob(f"the bytes that came for blob {self.digest} have digest {self._hash.hexdigest()}")
        with _room(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)

    def restart(self) -> None:
        """Begin again from the first byte."""
        self._drop()
        self.resumed = False

    def _drop(self) -> None:
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self._total = None
        self.offset = 0

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what came for a later attempt."""
        self._file.close()
