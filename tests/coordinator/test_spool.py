"""Uploads: resume, verification, refusals before anything is written, durability, and bounded disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from configs.schema import InnerConfig
from coordinator.expected import ExpectedOutput
from coordinator.sink import Sink
from coordinator.spool import Spool
from model import tensor_file
from model.layout import ModuleSpec, TensorSpec
from model.store import BlobStore
from protocol.errors import CorruptBlob, DiskFull, RejectedTensor, StaleLease, UnknownBlob
from protocol.tasks import BlobRef, MalformedMessage
from protocol.tensors import UploadHeader

TASK = "train/TRAIN/3/0"
SPECS = (TensorSpec("a.weight", (3, 5)), TensorSpec("b.weight", (7,)))
MODULE = ExpectedOutput.module(ModuleSpec("0.1", SPECS))
RECORD = ExpectedOutput.record(64)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(root: Path, store: BlobStore) -> Iterator[Spool]:
    spool = Spool(root, store)
    yield spool
    spool.retain([])


def _tensors(value: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {spec.name: (value * generator.standard_normal(spec.shape)).astype(np.float32) for spec in SPECS}


def _module_bytes(tmp_path: Path, tensors: Mapping[str, np.ndarray]) -> bytes:
    tensor_file.write(tmp_path / "module", tensors)
    return (tmp_path / "module").read_bytes()


def _header(data: bytes, output: str = "0.1", offset: int = 0, **changes: Any) -> UploadHeader:
    module = changes.get("kind", "module") in ("module", "inner_state")
    declared = {
        "task_id": TASK,
        "fence": 1,
        "output": output,
        "kind": "module",
        "tensors": [(spec.name, "float32", list(spec.shape)) for spec in SPECS] if module else [],
        "digest": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "offset": offset,
    }
    return UploadHeader.model_validate(declared | changes)


def _upload(
    spool: Spool, data: bytes, expected: ExpectedOutput = MODULE, chunk_bytes: int = 50, **changes: Any
) -> UploadHeader:
    header = _header(data, **changes)
    sink = spool.open(header, expected)
    for at in range(header.offset, len(data), chunk_bytes):
        sink.write(data[at : at + chunk_bytes])
    assert sink.finish() == len(data)
    return header


def _ref(data: bytes) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))


def _files(root: Path) -> list[str]:
    return sorted(path.suffix for path in root.rglob("*") if path.is_file())


def test_an_output_arrives_is_verified_and_moves_into_the_store(
    spool: Spool, store: BlobStore, root: Path, tmp_path: Path
) -> None:
    tensors = _tensors()
    data = _module_bytes(tmp_path, tensors)
    _upload(spool, data)
    assert spool.verified(TASK, 1) == {"0.1": _ref(data)}
    norm = float(np.sqrt(sum(np.sum(np.square(tensor.astype(np.float64))) for tensor in tensors.values())))
    assert spool.norms(TASK, 1) == {"0.1": pytest.approx(norm, rel=1e-12)}
    assert not store.has(_ref(data).digest)

    spool.commit(TASK, 1, {"0.1": _ref(data)})
    assert store.path(_ref(data).digest).read_bytes() == data
    spool.discard(TASK)
    assert _files(root) == []


def test_a_commit_can_be_repeated_after_a_restart(spool: Spool, store: BlobStore, root: Path, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    _upload(spool, data)
    for _ in range(2):
        again = Spool(root, store)
        assert again.verified(TASK, 1) == {"0.1": _ref(data)}
        again.commit(TASK, 1, {"0.1": _ref(data)})
    assert store.path(_ref(data).digest).read_bytes() == data


@pytest.mark.parametrize("cut", [0, 1, 7, 100])
def test_an_interrupted_upload_continues_where_it_stopped_even_after_a_restart(
    spool: Spool, store: BlobStore, root: Path, tmp_path: Path, cut: int
) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.write(data[:cut])
    sink.abort()
    again = Spool(root, store)
    assert again.offset(TASK, 1, _ref(data).digest) == cut
    assert again.verified(TASK, 1) == {}
    _upload(again, data, offset=cut)
    assert again.verified(TASK, 1) == {"0.1": _ref(data)}
    assert again.offset(TASK, 1, _ref(data).digest) == len(data)


def test_bytes_beyond_the_offset_are_dropped(spool: Spool, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.write(b"x" * 60)
    sink.abort()
    _upload(spool, data, offset=0)


def test_an_offset_beyond_what_is_held_is_refused(spool: Spool, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    with pytest.raises(MalformedMessage, match=r"only 0 bytes of output '0\.1' are held, not 8"):
        spool.open(_header(data, offset=8), MODULE)


def test_finishing_a_finished_upload_answers_again(spool: Spool, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    _upload(spool, data)
    sink = spool.open(_header(data, offset=len(data)), MODULE)
    assert sink.finish() == sink.finish() == len(data)
    assert spool.verified(TASK, 1) == {"0.1": _ref(data)}


def test_two_outputs_of_equal_bytes_are_both_kept(spool: Spool, store: BlobStore, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    _upload(spool, data)
    held = spool.offset(TASK, 1, _ref(data).digest)
    _upload(spool, data, output="0.2", offset=held)
    outputs = {"0.1": _ref(data), "0.2": _ref(data)}
    assert spool.verified(TASK, 1) == outputs
    spool.commit(TASK, 1, outputs)
    assert spool.verified(TASK, 1) == outputs
    assert store.path(_ref(data).digest).read_bytes() == data


def test_uploads_under_two_fences_stay_apart(spool: Spool, tmp_path: Path) -> None:
    first, second = (_module_bytes(tmp_path, _tensors(seed=seed)) for seed in (1, 2))
    _upload(spool, first, fence=1)
    _upload(spool, second, fence=2)
    assert spool.verified(TASK, 1) == {"0.1": _ref(first)}
    assert spool.verified(TASK, 2) == {"0.1": _ref(second)}
    assert spool.offset(TASK, 2, _ref(first).digest) == 0


def test_an_output_holds_one_file_whatever_is_sent_for_it(spool: Spool, root: Path, tmp_path: Path) -> None:
    first, second = (_module_bytes(tmp_path, _tensors(seed=seed)) for seed in (1, 2))
    _upload(spool, first)
    sink = spool.open(_header(second), MODULE)
    assert spool.verified(TASK, 1) == {}
    sink.write(second[:10])
    sink.abort()
    _upload(spool, first)
    assert _files(root) == [".record", ".whole"]
    assert spool.verified(TASK, 1) == {"0.1": _ref(first)}


def test_commit_takes_only_what_was_verified(spool: Spool, store: BlobStore, tmp_path: Path) -> None:
    data, other = (_module_bytes(tmp_path, _tensors(seed=seed)) for seed in (1, 2))
    _upload(spool, data)
    for wrong in ({"0.1": _ref(data), "0.2": _ref(data)}, {"0.1": _ref(other)}):
        with pytest.raises(UnknownBlob, match="was not uploaded"):
            spool.commit(TASK, 1, wrong)
    assert list(store.digests()) == []


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected", "message"),
    [
        ({"kind": "record", "tensors": []}, MODULE, "announced as record, expected module"),
        ({"tensors": [("a.weight", "float32", [3, 5])]}, MODULE, r"lacks b\.weight of shape \(7,\)"),
        (
            {"tensors": [("a.weight", "float32", [5, 3]), ("b.weight", "float32", [7])]},
            MODULE,
            r"a\.weight has shape \(5, 3\), expected \(3, 5\)",
        ),
        (
            {
                "tensors": [
                    (name, "float32", shape) for name, shape in (("a.weight", [3, 5]), ("b.weight", [7]), ("c", []))
                ]
            },
            MODULE,
            "holds c, which is not expected",
        ),
        ({"size": 10**12}, MODULE, r"1000000000000 bytes, expected exactly \d+"),
        ({"size": 65, "kind": "record"}, RECORD, "65 bytes; at most 64 are accepted"),
        ({"size": 5 * 1024**3, "kind": "tokens"}, ExpectedOutput.tokens(), "at most 4294967296 are accepted"),
        ({"size": 2**29, "kind": "record"}, ExpectedOutput.record(), "at most 268435456 are accepted"),
    ],
)
def test_what_a_header_declares_is_refused_before_anything_is_written(
    spool: Spool, root: Path, tmp_path: Path, changes: dict[str, Any], expected: ExpectedOutput, message: str
) -> None:
    data = _module_bytes(tmp_path, _tensors())
    with pytest.raises(RejectedTensor, match=message):
        spool.open(_header(data, **changes), expected)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_names_the_tensor(
    spool: Spool, root: Path, tmp_path: Path, value: float
) -> None:
    tensors = _tensors()
    tensors["b.weight"][6] = value
    with pytest.raises(RejectedTensor, match=r"output '0\.1' of task train/TRAIN/3/0: b\.weight .* not finite"):
        _upload(spool, _module_bytes(tmp_path, tensors))
    assert _files(root) == []
    assert spool.verified(TASK, 1) == {}


def _foreign_header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of exactly the expected size with other tensors inside."""
    data: bytes = save({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert len(data) == MODULE.max_bytes
    return data


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a.weight": (5, 3), "b.weight": (7,)}, r"a\.weight has shape \(5, 3\), expected \(3, 5\)"),
        ({"a.weight": (3, 5), "c.weight": (7,)}, r"lacks b\.weight"),
    ],
)
def test_a_file_with_other_tensors_than_declared_is_refused(
    spool: Spool, root: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(RejectedTensor, match=message):
        _upload(spool, _foreign_header(shapes))
    assert _files(root) == []


def test_a_file_that_is_no_tensor_file_is_refused(spool: Spool, root: Path) -> None:
    with pytest.raises(RejectedTensor, match="not a tensor file"):
        _upload(spool, b"\xff" * MODULE.max_bytes)
    assert _files(root) == []


def test_bytes_of_another_digest_are_refused_and_dropped(spool: Spool, root: Path, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.write(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptBlob, match="send it from the start"):
        sink.finish()
    assert _files(root) == []
    _upload(spool, data)


def test_bytes_beyond_the_declared_size_are_refused(spool: Spool, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.write(data)
    with pytest.raises(MalformedMessage, match=f"more than the announced {len(data)} bytes"):
        sink.write(b"x")
    assert spool.offset(TASK, 1, _ref(data).digest) == len(data)


def test_a_finish_with_bytes_missing_keeps_those_that_came(spool: Spool, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.write(data[:40])
    with pytest.raises(MalformedMessage, match=f"40 of {len(data)} bytes"):
        sink.finish()
    assert spool.offset(TASK, 1, _ref(data).digest) == 40


def test_a_later_upload_takes_the_file_over(spool: Spool, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    earlier = spool.open(_header(data), MODULE)
    earlier.write(data[:30])
    later = spool.open(_header(data, offset=30), MODULE)
    with pytest.raises(StaleLease, match="taken over"):
        earlier.write(data[30:60])
    later.write(data[30:])
    with pytest.raises(StaleLease, match="taken over"):
        earlier.finish()
    assert later.finish() == len(data)


def test_a_discarded_task_ends_its_uploads(spool: Spool, root: Path, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    spool.discard(TASK)
    with pytest.raises(StaleLease, match="its task is over"):
        sink.write(data)
    assert list(root.iterdir()) == []
    spool.discard(TASK)


def test_an_upload_that_was_given_up_takes_no_more_bytes(spool: Spool, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.abort()
    sink.abort()
    with pytest.raises(StaleLease, match="given up"):
        sink.write(data)


def test_no_room_is_named_and_what_came_stays(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.write(data[:20])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("coordinator.sink._write_all", full)
    with pytest.raises(DiskFull, match="free some space"):
        sink.write(data[20:40])
    monkeypatch.undo()
    sink.abort()
    assert spool.offset(TASK, 1, _ref(data).digest) == 20


def test_names_that_a_peer_chooses_never_become_file_names(spool: Spool, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    _upload(spool, b"{}", RECORD, kind="record", output="../../outside", task_id="../../../outside/\x00x")
    assert not outside.exists()
    assert all(set(part) <= set("0123456789abcdef-.wholerecord") for path in root.rglob("*") for part in [path.name])
    assert spool.verified("../../../outside/\x00x", 1) == {"../../outside": _ref(b"{}")}
    assert spool.norms("../../../outside/\x00x", 1) == {}


def test_retain_removes_the_leftovers_of_other_tasks(spool: Spool, root: Path, tmp_path: Path) -> None:
    for task_id in (TASK, "train/TRAIN/3/1"):
        _upload(spool, b"{}", RECORD, kind="record", task_id=task_id)
    spool.retain([TASK])
    assert spool.verified(TASK, 1) == {"0.1": _ref(b"{}")}
    assert spool.verified("train/TRAIN/3/1", 1) == {}
    assert len(list(root.iterdir())) == 1


def test_inner_state_is_checked_like_a_module(spool: Spool, tmp_path: Path) -> None:
    moments = tuple(TensorSpec(f"{moment}.{spec.name}", spec.shape) for moment in "mv" for spec in SPECS)
    tensors = {spec.name: np.ones(spec.shape, np.float32) for spec in moments}
    declared = [(spec.name, "float32", list(spec.shape)) for spec in moments]
    data = _module_bytes(tmp_path, tensors)
    expected = ExpectedOutput.inner_state(InnerConfig(), SPECS)
    _upload(spool, data, expected, output="inner_state", kind="inner_state", tensors=declared)
    assert spool.norms(TASK, 1)["inner_state"] == pytest.approx(44**0.5)


@pytest.mark.parametrize(
    "step", ["os.fsync", "coordinator.sink._write_record", "os.replace", "coordinator.sink.fsync_path"]
)
def test_a_stop_anywhere_in_finish_leaves_an_output_that_verifies_or_resumes(
    spool: Spool, store: BlobStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    data = _module_bytes(tmp_path, _tensors())
    sink = spool.open(_header(data), MODULE)
    sink.write(data)

    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(step, stop)
    with pytest.raises(Stop):
        sink.finish()
    monkeypatch.undo()
    sink.abort()
    again = Spool(root, store)
    assert again.offset(TASK, 1, _ref(data).digest) == len(data)
    _upload(again, data, offset=len(data))
    again.commit(TASK, 1, {"0.1": _ref(data)})
    assert store.path(_ref(data).digest).read_bytes() == data


def test_a_record_without_its_file_does_not_count(spool: Spool, root: Path, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    _upload(spool, data)
    (whole,) = root.rglob("*.whole")
    (record,) = root.rglob("*.record")
    assert json.loads(record.read_text())["digest"] == _ref(data).digest
    whole.unlink()
    assert spool.verified(TASK, 1) == {}


def test_outputs_may_arrive_from_several_threads(spool: Spool, tmp_path: Path) -> None:
    blobs = {f"{index}.0": _module_bytes(tmp_path, _tensors(seed=index)) for index in range(8)}
    threads = [
        threading.Thread(target=_upload, args=(spool, data), kwargs={"output": output})
        for output, data in blobs.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spool.verified(TASK, 1) == {output: _ref(data) for output, data in blobs.items()}


def test_two_uploads_of_one_output_at_once_leave_one_verified_file(spool: Spool, root: Path, tmp_path: Path) -> None:
    data = _module_bytes(tmp_path, _tensors())
    refused: list[StaleLease] = []

    def upload() -> None:
        sink: Sink = spool.open(_header(data), MODULE)
        try:
            for at in range(0, len(data), 8):
                sink.write(data[at : at + 8])
            sink.finish()
        except StaleLease as error:
            refused.append(error)

    threads = [threading.Thread(target=upload) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) < 6
    assert spool.verified(TASK, 1) == {"0.1": _ref(data)}
    assert _files(root) == [".record", ".whole"]
