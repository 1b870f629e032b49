"""Holds blobs of a run that goes on: hard links in RUN/pins/<id>, whose bytes stay whatever the run lets go of.

A link is taken at once or the blob is gone already; nothing is agreed with the coordinator, which may delete, crash and
restart as it likes. The links of a process that died are removed by the next one: their lock file is free then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PINS = "pins"
# What a file system answers that has no hard links, or no room for one; so does a copy of a run that is read-only.
NO_LINKS = (
    errno.EPERM,
    errno.EACCES,
    errno.EROFS,
    errno.EOPNOTSUPP,
    errno.EMLINK,
    errno.ENOSYS,
    errno.ENOSPC,
    errno.EDQUOT,
)


class Pins:
    """The links of one holder; those it lacks were deleted before they were asked for."""

    def __init__(self, root: Path, blobs: Path) -> None:
        self.root = root
        self._blobs = blobs

    def hold(self, digests: Iterable[str]) -> set[str]:
        """Link blobs; returns those that are not there. Raises OSError where the file system has no hard links."""
        missing = set()
        for digest in digests:
            try:
                os.link(self._blobs / digest, self.root / digest)
            except FileExistsError:
                continue
            except FileNotFoundError:
                missing.add(digest)
        return missing


@contextmanager
def pinning(run_dir: Path) -> Iterator[Pins]:
    """A folder for links, gone when it is left. Raises OSError where the run directory cannot be written."""
    clear_abandoned(run_dir)
    place = run_dir / PINS
    place.mkdir(exist_ok=True)
    descriptor, lock = _own_lock(place)
    root = lock.with_suffix("")
    try:
        root.mkdir()
        yield Pins(root, run_dir / "blobs")
    finally:
        shutil.rmtree(root, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def clear_abandoned(run_dir: Path) -> int:
    """Remove the links of holders that are gone; returns how many holders."""
    removed = 0
    for lock in list((run_dir / PINS).glob("*.lock")):
        with suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
                removed += 1
            finally:
                os.close(descriptor)
    return removed


def _own_lock(place: Path) -> tuple[int, Path]:
    """A new lock file that is held; one that was taken for abandoned before it was locked is left for another."""
    while True:
        path = place / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, path
        os.close(descriptor)
