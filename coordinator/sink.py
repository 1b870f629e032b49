"""One upload: bytes appended to a partial file, which becomes a verified one with a durable record, or goes.

Of two uploads of the same output the later one has the file; the earlier is told so at its next call.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from coordinator.expected import ExpectedOutput
from model.store import fsync_path, write_whole
from protocol.errors import StaleLease, WaitingForRoom
from protocol.tasks import MalformedMessage
from protocol.tensors import UploadHeader


@dataclass(frozen=True, slots=True)
class SinkFiles:
    """Where an output lies while it arrives, once it was verified, and what is recorded of it then."""

    part: Path
    whole: Path
    record: Path


@contextlib.contextmanager
def disk_full_by_name() -> Iterator[None]:
    """Turn the system's 'no space' into WaitingForRoom, which is a DiskFull that the peer tries again."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WaitingForRoom("no room for an upload; free some space in the run directory") from None
        raise


class Sink:
    """Takes the bytes of one upload in order. Calls block on the disk; any thread may make them."""

    def __init__(self, files: SinkFiles, header: UploadHeader, expected: ExpectedOutput) -> None:
        self._files = files
        self._header = header
        self._expected = expected
        self._lock = threading.Lock()
        self._received = header.offset
        self._gone = ""
        self._file: BinaryIO | None = None  # None: it was verified before
        if not files.whole.exists():
            self._file = files.part.open("r+b" if files.part.exists() else "x+b", buffering=0)
            self._file.truncate(header.offset)
            self._file.seek(header.offset)

    def write(self, data: bytes) -> None:
        """Append bytes. Raises MalformedMessage beyond the declared size, StaleLease once taken over, DiskFull."""
        with self._lock:
            self._check_here()
            if self._received + len(data) > self._header.size:
                raise MalformedMessage(
                    f"more than the announced {self._header.size} bytes of output {self._header.output!r} arrived"
                )
            if self._file is not None:
                with disk_full_by_name():
                    _write_all(self._file, data)
            self._received += len(data)

    def finish(self) -> int:
        """Verify the whole blob, make it durable and record it; returns its size. Repeatable.

        Raises CorruptBlob or RejectedTensor (the bytes are dropped), MalformedMessage where some are missing (the
        others stay for a resume), StaleLease, DiskFull.
        """
        with self._lock:
            self._check_here()
            if self._received != self._header.size:
                raise MalformedMessage(
                    f"{self._received} of {self._header.size} bytes of output {self._header.output!r} arrived"
                )
            if self._file is not None:
                self._keep(self._file)
                self._file = None
            return self._header.size

    def abort(self) -> None:
        """Let go of the file; what arrived stays for a resume. Never raises."""
        self._leave("was given up")

    def take_over(self) -> None:
        """A later upload of the output begins, or the task is over: this one must not touch the file again."""
        self._leave("was taken over by a later one, or its task is over")

    def _leave(self, reason: str) -> None:
        with self._lock:
            self._gone = self._gone or reason
            if self._file is not None:
                self._file.close()

    def _check_here(self) -> None:
        if self._gone:
            raise StaleLease(f"this upload of output {self._header.output!r} {self._gone}")

    def _keep(self, file: BinaryIO) -> None:
        """The record is durable before the name of a verified file is: a file without record would not count."""
        try:
            norm = self._expected.check_file(self._files.part, self._header)
        except ValueError:
            file.close()
            self._gone = "was refused"
            self._files.part.unlink(missing_ok=True)
            raise
        with disk_full_by_name():
            os.fsync(file.fileno())
            _write_record(self._files.record, self._header, norm if self._expected.tensors else None)
            os.replace(self._files.part, self._files.whole)
            fsync_path(self._files.whole.parent)
        file.close()


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Raw writes may be short."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _write_record(path: Path, header: UploadHeader, norm: float | None) -> None:
    record = {"output": header.output, "digest": header.digest, "size": header.size, "norm": norm}
    write_whole(path, json.dumps(record))
