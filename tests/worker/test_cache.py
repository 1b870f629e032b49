"""The blob cache: what is held stays, the oldest goes, corruption is found, processes share a directory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.tasks import BlobRef
from worker.cache import BlobCache, CacheTooSmall


def content(seed: int, size: int = 100) -> bytes:
    return bytes([seed]) * size


def ref(data: bytes) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))


class Source:
    """Where the cache fetches from; remembers what was asked."""

    def __init__(self, *blobs: bytes) -> None:
        self.blobs = {ref(data).digest: data for data in blobs}
        self.asked: list[str] = []

    def __call__(self, digest: str, path: Path) -> int:
        self.asked.append(digest)
        path.write_bytes(self.blobs[digest])
        return len(self.blobs[digest])


BLOBS = [content(seed) for seed in range(5)]


def test_fetches_once(tmp_path: Path) -> None:
    cache, source = BlobCache(tmp_path, 1000), Source(*BLOBS)
    path, fetched = cache.hold(ref(BLOBS[0]), source)
    assert path.read_bytes() == BLOBS[0]
    assert fetched == 100
    cache.release_all()
    assert cache.hold(ref(BLOBS[0]), source) == (path, 0)
    assert BlobCache(tmp_path, 1000).hold(ref(BLOBS[0]), source) == (path, 0)
    assert source.asked == [ref(BLOBS[0]).digest]


def test_evicts_the_least_recently_used_and_never_what_is_held(tmp_path: Path) -> None:
    cache, source = BlobCache(tmp_path, 300), Source(*BLOBS)
    for data in BLOBS[:3]:
        cache.hold(ref(data), source)
        cache.release_all()
    cache.hold(ref(BLOBS[0]), source)  # used again, and held
    cache.hold(ref(BLOBS[3]), source)
    assert set(cache.digests()) == {ref(data).digest for data in (BLOBS[0], BLOBS[2], BLOBS[3])}
    cache.hold(ref(BLOBS[4]), source)
    assert set(cache.digests()) == {ref(data).digest for data in (BLOBS[0], BLOBS[3], BLOBS[4])}
    assert cache.size_bytes() == 300
    with pytest.raises(CacheTooSmall, match=r"needs 400 bytes.*may hold 300.*execution\.cache_bytes"):
        cache.hold(ref(BLOBS[1]), source)


@pytest.mark.parametrize("damage", [content(9), content(0, 50), b""])
def test_a_corrupt_file_is_fetched_again(tmp_path: Path, damage: bytes) -> None:
    source = Source(*BLOBS)
    path, _ = BlobCache(tmp_path, 1000).hold(ref(BLOBS[0]), source)
    path.write_bytes(damage)
    again = BlobCache(tmp_path, 1000)
    assert again.hold(ref(BLOBS[0]), source) == (path, 100)
    assert path.read_bytes() == BLOBS[0]


def test_a_file_that_changes_while_the_process_lives_is_read_again(tmp_path: Path) -> None:
    cache, source = BlobCache(tmp_path, 1000), Source(*BLOBS)
    path, _ = cache.hold(ref(BLOBS[0]), source)
    cache.release_all()
    path.write_bytes(content(9))
    os.utime(path, ns=(1, 1))
    cache.hold(ref(BLOBS[0]), source)
    assert path.read_bytes() == BLOBS[0]


def test_a_failed_fetch_leaves_the_blob_absent(tmp_path: Path) -> None:
    cache, source = BlobCache(tmp_path, 1000), Source(*BLOBS)

    def interrupted(digest: str, path: Path) -> int:
        Path(f"{path}.part").write_bytes(b"half")
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cache.hold(ref(BLOBS[0]), interrupted)
    assert cache.digests() == []
    assert (tmp_path / "partial" / f"{ref(BLOBS[0]).digest}.part").exists()  # to be continued
    assert cache.hold(ref(BLOBS[0]), source)[1] == 100


def test_interrupted_fetches_make_room(tmp_path: Path) -> None:
    cache, source = BlobCache(tmp_path, 100), Source(*BLOBS)
    rest = tmp_path / "partial" / f"{ref(BLOBS[1]).digest}.part"
    rest.write_bytes(b"half")
    cache.hold(ref(BLOBS[0]), source)
    cache.release_all()
    assert rest.exists()
    cache.hold(ref(BLOBS[2]), source)
    assert not rest.exists()


HOLDER = """
import sys
from pathlib import Path
from protocol.tasks import BlobRef
from worker.cache import BlobCache
cache = BlobCache(Path(sys.argv[1]), 1000)
cache.hold(BlobRef(digest=sys.argv[2], size=100), lambda digest, path: 1 / 0)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_keeps_what_it_holds_until_it_dies(tmp_path: Path) -> None:
    cache, source = BlobCache(tmp_path, 100), Source(*BLOBS)
    cache.hold(ref(BLOBS[0]), source)
    cache.release_all()
    command = [sys.executable, "-c", HOLDER, str(tmp_path), ref(BLOBS[0]).digest]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        cache.hold(ref(BLOBS[1]), source)
        cache.release_all()
        assert set(cache.digests()) == {ref(data).digest for data in BLOBS[:2]}
        holder.kill()
        holder.wait()
    cache.hold(ref(BLOBS[2]), source)
    assert cache.digests() == [ref(BLOBS[2]).digest]


def test_lists_only_large_blobs(tmp_path: Path) -> None:
    large = content(7, 500)
    cache, source = BlobCache(tmp_path, 1000), Source(*BLOBS, large)
    cache.hold(ref(BLOBS[0]), source)
    cache.hold(ref(large), source)
    assert cache.digests(min_bytes=500) == [ref(large).digest]


def test_adopts_outputs_of_its_own(tmp_path: Path) -> None:
    cache, source = BlobCache(tmp_path, 1000), Source()
    directory = cache.scratch()
    (directory / "0.0").write_bytes(BLOBS[0])
    cache.adopt(directory / "0.0", ref(BLOBS[0]))
    assert cache.hold(ref(BLOBS[0]), source)[1] == 0
