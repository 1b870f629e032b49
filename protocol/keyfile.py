"""Files of RUN/certs: each replaced whole, the private ones never readable by others, one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = "lock"


def write_key_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace the file whole; a private one is never readable by others, not even for a moment."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def one_writer(certs_dir: Path) -> Iterator[None]:
    """Wait for whoever else is changing the keys of the run, so that two commands at once do not lose an entry."""
    certs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(certs_dir / LOCK_FILE, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
