from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from model.store import BlobMismatch, BlobStore, UnknownBlob, file_digest

HELLO = hashlib.sha256(b"hello").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_bytes_are_named_by_their_digest(store: BlobStore) -> None:
    assert store.put_bytes(b"hello") == (HELLO, 5)
    assert store.has(HELLO)
    assert store.size(HELLO) == 5
    assert store.path(HELLO).read_bytes() == b"hello"
    assert list(store.digests()) == [HELLO]
    store.put_bytes(b"hello")
    assert list(store.digests()) == [HELLO]


def test_files_are_moved_in(store: BlobStore) -> None:
    aside = store.scratch() / "x"
    aside.write_bytes(b"hello")
    assert store.put_file(aside) == (HELLO, 5)
    assert store.path(HELLO).read_bytes() == b"hello"
    assert not aside.parent.exists()


def test_files_of_another_file_system_are_copied_in(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"hello")
    replace = os.replace

    def across(source: Path, target: Path) -> None:
        if Path(source) == outside:
            raise OSError(18, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", across)
    assert store.put_file(outside) == (HELLO, 5)
    assert not outside.exists()
    assert store.path(HELLO).read_bytes() == b"hello"
    assert list((store.root / "scratch").iterdir()) == []


def test_a_blob_is_on_disk_before_it_has_its_name(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append("fsync directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    store.put_bytes(b"hello")
    assert events == ["fsync file", "rename", "fsync directory"]


def test_an_interrupted_write_leaves_no_blob(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        store.put_bytes(b"hello")
    assert list(store.digests()) == []
    store.clear_scratch()
    assert list((store.root / "scratch").iterdir()) == []


def test_scratch_directories_are_the_callers_own(store: BlobStore) -> None:
    assert store.scratch() != store.scratch()


def test_what_is_absent_or_no_digest_is_named(store: BlobStore) -> None:
    with pytest.raises(UnknownBlob, match=HELLO):
        store.size(HELLO)
    for wrong in ("", "../state.db", HELLO[:-1], HELLO.upper(), HELLO + "\n"):
        with pytest.raises(UnknownBlob, match="64 lower-case hex"):
            store.path(wrong)


def test_damage_is_found(store: BlobStore) -> None:
    store.put_bytes(b"hello")
    store.verify(HELLO)
    store.path(HELLO).write_bytes(b"jello")
    with pytest.raises(BlobMismatch, match=HELLO):
        store.verify(HELLO)


def test_delete(store: BlobStore) -> None:
    store.put_bytes(b"hello")
    store.delete(HELLO)
    store.delete(HELLO)
    assert not store.has(HELLO)


def test_file_digest_reads_a_stream(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello" * 100_000)
    assert file_digest(tmp_path / "x") == (hashlib.sha256(b"hello" * 100_000).hexdigest(), 500_000)
