"""Content-addressed blobs: immutable files named by the SHA-256 of their bytes, each complete and durable or absent.

Written aside, fsynced, renamed into place, directory fsynced. Nothing here looks inside a blob. Torch-free.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_DIGEST = re.compile(r"[0-9a-f]{64}")


class UnknownBlob(ValueError):
    """A digest that the store does not hold, or a string that is no digest."""


class BlobMismatch(ValueError):
    """Bytes that are not the ones their digest names."""


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes of a file, read in a stream."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Put a text file in the place of the former one, complete and durable or not at all."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    fsync_path(aside)
    os.replace(aside, path)
    fsync_path(path.parent)


class BlobStore:
    """Blobs in one directory. Safe for several threads and processes at once: a blob appears by one rename."""

    def __init__(self, root: Path, known_as: Path | None = None) -> None:
        """`known_as`: where people find these blobs, if elsewhere than in `root`."""
        self.root = Path(root)
        self._known_as = known_as or self.root
        self._scratch = self.root / "scratch"
        self._scratch.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob lies if it is there; raises UnknownBlob where `digest` is not a SHA-256 in hex."""
        if not _DIGEST.fullmatch(digest):
            raise UnknownBlob(f"{digest!r} is not a blob digest: expected 64 lower-case hex digits")
        return self.root / digest

    def known_path(self, digest: str) -> Path:
        """Where a person finds the blob: for messages."""
        return self._known_as / self.path(digest).name

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Size in bytes; raises UnknownBlob where it is absent."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise UnknownBlob(f"blob {digest} is not in {self._known_as}") from None

    def digests(self) -> Iterator[str]:
        """All blobs, in the order of their digests."""
        yield from sorted(name for name in os.listdir(self.root) if _DIGEST.fullmatch(name))

    def put_bytes(self, data: bytes) -> tuple[str, int]:
        """Store bytes; returns (digest, size)."""
        digest = hashlib.sha256(data).hexdigest()
        if not self.has(digest):
            aside = self.scratch() / "blob"
            aside.write_bytes(data)
            self.adopt(aside, digest)
        return digest, len(data)

    def put_file(self, path: Path) -> tuple[str, int]:
        """Move a file into the store; returns (digest, size)."""
        digest, size = file_digest(path)
        self.adopt(path, digest)
        return digest, size

    def adopt(self, path: Path, digest: str) -> None:
        """Move a file whose bytes were already verified against `digest` into the store, durably."""
        target = self.path(digest)
        if target.is_file():
            path.unlink()
        else:
            fsync_path(path)
            self._move(path, target)
            fsync_path(self.root)
        self._forget_scratch(path.parent)

    def verify(self, digest: str) -> None:
        """Read the blob again; raises BlobMismatch where its bytes are not the ones it is named by."""
        found, _ = file_digest(self.path(digest))
        if found != digest:
            raise BlobMismatch(f"blob {digest} in {self._known_as} holds bytes of digest {found}; delete the file")

    def delete(self, digest: str) -> None:
        """Remove a blob; nothing happens where it is absent."""
        self.path(digest).unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A new directory of the caller's own on the store's file system; it goes when its last file is moved in."""
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def clear_scratch(self) -> None:
        """Remove what interrupted writers left; only for the one owner of the store, before it starts."""
        shutil.rmtree(self._scratch)
        self._scratch.mkdir()

    def _move(self, path: Path, target: Path) -> None:
        try:
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            aside = self.scratch() / "blob"
            shutil.copyfile(path, aside)
            fsync_path(aside)
            os.replace(aside, target)
            path.unlink()
            self._forget_scratch(aside.parent)

    def _forget_scratch(self, directory: Path) -> None:
        if directory.parent == self._scratch:
            with contextlib.suppress(OSError):
                directory.rmdir()
