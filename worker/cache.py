"""Blobs on this machine's disk: verified by content, bounded in bytes, least recently used ones go first.

Several worker processes may share one directory. A blob in use is held under a shared file lock, which ends with the
process that holds it; eviction takes only blobs that nobody holds. Interrupted fetches are continued.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.store import BlobStore, file_digest
from protocol.tasks import BlobRef

# Brings a blob to a file, whole and verified or not at all, continuing `<file>.part`: (digest, file) -> bytes fetched.
Fetch = Callable[[str, Path], int]


class CacheTooSmall(ValueError):
    """A task whose inputs alone exceed the size limit of the cache."""


class BlobCache:
    """The blobs of one directory; `hold` makes one present and keeps it until `release_all`."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._store = BlobStore(root)
        self._partial = root / "partial"
        self._partial.mkdir(exist_ok=True)
        self.limit_bytes = limit_bytes
        self._held: dict[str, int] = {}  # digest -> descriptor that carries the shared lock
        self._verified: dict[str, tuple[int, int, int]] = {}  # digest -> what the file was when read

    def hold(self, blob: BlobRef, fetch: Fetch) -> tuple[Path, int]:
        """A verified file with the blob's bytes, and how many bytes had to be fetched.

        The file stays in place until `release_all`. Raises CacheTooSmall, and whatever `fetch` raises.
        """
        path = self._store.path(blob.digest)
        fetched = 0
        while not (blob.digest in self._held or self._take(blob)):
            fetched += self._fetch(blob, fetch)
        return path, fetched

    def release_all(self) -> None:
        """Let go of everything held; eviction may take it from now on."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def adopt(self, path: Path, blob: BlobRef) -> None:
        """Keep a file of our own whose bytes are the blob's: a later task of this worker need not fetch it."""
        self._make_room(blob.size)
        self._store.adopt(path, blob.digest)

    def has(self, digest: str) -> bool:
        """Whether the blob is present, intact or not."""
        return self._store.has(digest)

    def digests(self, min_bytes: int = 0) -> list[str]:
        """The blobs of at least `min_bytes` bytes that are present."""
        sizes = {digest: status.st_size for digest, status in self._entries()}
        return sorted(digest for digest, size in sizes.items() if size >= min_bytes)

    def size_bytes(self) -> int:
        """Bytes of all blobs together, partial files not counted."""
        return sum(status.st_size for _, status in self._entries())

    def scratch(self) -> Path:
        """A new directory beside the blobs, for outputs that may be adopted."""
        return self._store.scratch()

    def _entries(self) -> Iterator[tuple[str, os.stat_result]]:
        for digest in self._store.digests():
            with suppress(FileNotFoundError):  # another process may evict meanwhile
                yield digest, self._store.path(digest).stat()

    def _take(self, blob: BlobRef) -> bool:
        """Lock and verify the blob where it is present; a corrupt one is deleted."""
        path = self._store.path(blob.digest)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_open_at(descriptor, path):  # evicted between opening and locking
            os.close(descriptor)
            return False
        if not self._is_intact(blob, descriptor, path):
            self._store.delete(blob.digest)
            os.close(descriptor)
            return False
        status = os.fstat(descriptor)
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # access times are the order of eviction
        self._verified[blob.digest] = _signature(status)
        self._held[blob.digest] = descriptor
        return True

    def _is_intact(self, blob: BlobRef, descriptor: int, path: Path) -> bool:
        """Whether the bytes are the blob's; read once a process and again when the file has changed."""
        if self._verified.get(blob.digest) == _signature(os.fstat(descriptor)):
            return True
        return file_digest(path) == (blob.digest, blob.size)

    def _fetch(self, blob: BlobRef, fetch: Fetch) -> int:
        """Bring the blob into the directory unless another process has done so meanwhile; returns the bytes fetched."""
        with _locked(self._partial / f"{blob.digest}.lock"):
            if self._store.has(blob.digest):
                return 0
            self._make_room(blob.size)
            target = self._partial / blob.digest
            fetched = fetch(blob.digest, target)
            self._verified[blob.digest] = _signature(target.stat())
            self._store.adopt(target, blob.digest)
            return fetched

    def _make_room(self, incoming_bytes: int) -> None:
        """Evict the least recently used blobs that nobody holds until `incoming_bytes` more fit.

        What interrupted fetches left goes first. Raises CacheTooSmall where what this process holds
        for its task leaves too little room.
        """
        entries = sorted(self._entries(), key=lambda entry: entry[1].st_atime_ns)
        excess = sum(status.st_size for _, status in entries) + incoming_bytes - self.limit_bytes
        if excess > 0:
            self._discard_interrupted()
        for digest, status in entries:
            if excess <= 0:
                return
            if digest not in self._held and self._evict(digest):
                excess -= status.st_size
        held = sum(status.st_size for digest, status in entries if digest in self._held)
        if held + incoming_bytes > self.limit_bytes:
            raise CacheTooSmall(
                f"one task needs {held + incoming_bytes} bytes of blobs at once, and the cache in {self._store.root} "
                f"may hold {self.limit_bytes}: raise execution.cache_bytes"
            )

    def _discard_interrupted(self) -> None:
        """Delete what fetches left that no process is going on with."""
        for rest in self._partial.glob("*.part"):
            with suppress(BlockingIOError), _locked(rest.with_suffix(".lock"), wait=False):
                rest.unlink(missing_ok=True)

    def _evict(self, digest: str) -> bool:
        """Delete a blob unless a process holds it."""
        path = self._store.path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            self._store.delete(digest)
            return True
        finally:
            os.close(descriptor)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at `path`, which goes with the lock, alone; raises BlockingIOError rather than wait."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise
        if _is_open_at(descriptor, path):  # else the process that held it has removed it
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink()
        os.close(descriptor)


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
