"""Where the outputs of leased tasks arrive, resume, and wait verified until their task is complete.

Nothing here counts: `commit` moves verified files into the blob store. Peers name nothing on this disk (names are
hashes), hold one file per output, and cannot write beyond what that output may be. Verified outputs survive a restart.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.expected import ExpectedOutput
from coordinator.sink import Sink, SinkFiles, disk_full_by_name
from model.store import BlobStore, fsync_path
from protocol.errors import UnknownBlob
from protocol.tasks import BlobRef, MalformedMessage
from protocol.tensors import UploadHeader

__all__ = ["ExpectedOutput", "Sink", "Spool"]


@dataclass(frozen=True, slots=True)
class _Verified:
    """A verified output; `norm` is None where it holds no tensors."""

    blob: BlobRef
    norm: float | None


class Spool:
    """The outputs of all leased tasks, in a directory on the blob store's file system."""

    def __init__(self, root: Path, store: BlobStore) -> None:
        self._root = root
        self._store = store
        self._lock = threading.Lock()
        self._sinks: dict[Path, Sink] = {}
        root.mkdir(parents=True, exist_ok=True)

    def offset(self, task_id: str, fence: int, digest: str) -> int:
        """Bytes of an upload that are held already; the whole size once it was finished."""
        files = list(self._directory(task_id, fence).glob(f"*-{_hashed(digest)}.*"))
        whole = [file for file in files if file.suffix == ".whole"]
        return max((_size(file) for file in whole or files), default=0)

    def open(self, header: UploadHeader, expected: ExpectedOutput) -> Sink:
        """A sink for the bytes from `header.offset` on; bytes held beyond it are dropped.

        An earlier upload of the same output is taken over, other bytes of it are removed. Raises RejectedTensor before
        anything is written, MalformedMessage where the offset lies beyond what is held, DiskFull.
        """
        expected.check_header(header)
        files = self._files(header.task_id, header.fence, header.output, header.digest)
        while True:
            with self._lock, disk_full_by_name():
                earlier = self._sinks.get(files.record)
                if earlier is None:
                    sink = self._sinks[files.record] = self._begin(files, header, expected)
                    return sink
            self._end(files.record, earlier)

    def verified(self, task_id: str, fence: int) -> dict[str, BlobRef]:
        """The outputs that arrived whole and passed, by name."""
        return {output: verified.blob for output, verified in self._records(task_id, fence).items()}

    def path(self, task_id: str, fence: int, output: str, digest: str) -> Path:
        """Where the bytes of a verified output lie: here, or in the store after a commit."""
        whole = self._files(task_id, fence, output, digest).whole
        return whole if whole.exists() else self._store.path(digest)

    def norms(self, task_id: str, fence: int) -> dict[str, float]:
        """The L2 norm of each verified output that holds tensors, by name."""
        records = self._records(task_id, fence)
        return {output: verified.norm for output, verified in records.items() if verified.norm is not None}

    def commit(self, task_id: str, fence: int, outputs: Mapping[str, BlobRef]) -> None:
        """Move verified outputs into the blob store, durably; repeating it is a no-op.

        Raises UnknownBlob, before anything moves, for an output that was not verified with that digest and size.
        """
        verified = self.verified(task_id, fence)
        for output, blob in outputs.items():
            if verified.get(output) != blob:
                raise UnknownBlob(
                    f"output {output!r} of task {task_id} was not uploaded as {blob.digest} ({blob.size} bytes); "
                    "upload it again"
                )
        for output, blob in sorted(outputs.items()):
            whole = self._files(task_id, fence, output, blob.digest).whole
            if whole.exists():
                self._store.adopt(whole, blob.digest)

    def discard(self, task_id: str, fence: int | None = None) -> None:
        """Remove everything that arrived for a task, under all its fences or under one."""
        directory = self._root / _hashed(task_id)
        self._remove(directory if fence is None else directory / f"{fence:d}")

    def retain(self, task_ids: Iterable[str]) -> None:
        """Remove what arrived for any other task: at a start, the leftovers of tasks that are over."""
        kept = {_hashed(task_id) for task_id in task_ids}
        for directory in list(self._root.iterdir()):
            if directory.name not in kept:
                self._remove(directory)

    def recorded(self) -> set[str]:
        """The digests of all verified outputs, wherever their bytes lie: here, or in the store after a commit."""
        return {str(json.loads(path.read_text())["digest"]) for path in self._root.glob("*/*/*.record")}

    def _begin(self, files: SinkFiles, header: UploadHeader, expected: ExpectedOutput) -> Sink:
        directory = files.record.parent
        if not directory.is_dir():
            directory.mkdir(parents=True)
            fsync_path(directory.parent)
            fsync_path(self._root)
        _drop_other_bytes(files)
        if header.offset == header.size and not files.whole.exists() and _size(files.part) < header.size:
            _copy_equal_output(files)
        held = _size(files.whole) if files.whole.exists() else _size(files.part)
        if header.offset > held:
            raise MalformedMessage(f"only {held} bytes of output {header.output!r} are held, not {header.offset}")
        return Sink(files, header, expected)

    def _end(self, record: Path, sink: Sink) -> None:
        """Waits for a call that is under way in `sink`, so the spool's own lock is free meanwhile."""
        sink.take_over()
        with self._lock:
            if self._sinks.get(record) is sink:
                del self._sinks[record]

    def _remove(self, directory: Path) -> None:
        with self._lock:
            sinks = [(record, sink) for record, sink in self._sinks.items() if directory in record.parents]
        for record, sink in sinks:
            self._end(record, sink)
        shutil.rmtree(directory, ignore_errors=True)

    def _directory(self, task_id: str, fence: int) -> Path:
        return self._root / _hashed(task_id) / f"{fence:d}"

    def _files(self, task_id: str, fence: int, output: str, digest: str) -> SinkFiles:
        directory = self._directory(task_id, fence)
        stem = f"{_hashed(output)}-{_hashed(digest)}"
        return SinkFiles(
            directory / f"{stem}.part", directory / f"{stem}.whole", directory / f"{_hashed(output)}.record"
        )

    def _records(self, task_id: str, fence: int) -> dict[str, _Verified]:
        """What was recorded and is still held, here or, after a commit, in the store."""
        found = {}
        for path in sorted(self._directory(task_id, fence).glob("*.record")):
            record = json.loads(path.read_text())
            blob = BlobRef(digest=record["digest"], size=record["size"])
            files = self._files(task_id, fence, record["output"], blob.digest)
            if files.whole.exists() or (not files.part.exists() and self._store.has(blob.digest)):
                found[record["output"]] = _Verified(blob, record["norm"])
        return found


def _hashed(text: str) -> str:
    """A file name for words that a peer chose."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _drop_other_bytes(files: SinkFiles) -> None:
    """An output holds one upload: remove what arrived under another digest."""
    for path in files.record.parent.glob(f"{files.record.stem}-*"):
        if path.stem != files.part.stem:
            if path.suffix == ".whole":
                files.record.unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _copy_equal_output(files: SinkFiles) -> None:
    """The peer was told that these bytes are here: they are, as another output of the task with the same digest."""
    digest = files.part.stem.partition("-")[2]
    for whole in files.record.parent.glob(f"*-{digest}.whole"):
        shutil.copyfile(whole, files.part)
        return
