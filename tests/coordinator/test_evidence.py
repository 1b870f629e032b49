"""What is kept of claims that differ: both results of a ban, what tells them apart, and no more of a mere suspicion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.decisions import Dispute
from coordinator.evidence import difference, evidence_dir, keep_evidence, measure_evidence
from coordinator.state import Claim
from model import tensor_file
from model.store import BlobStore
from protocol.tasks import BlobRef

TASK = "train/TRAIN/3/1"


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def claim(store: BlobStore, worker: str, fence: int, *values: float) -> Claim:
    path = store.scratch() / "tensors"
    digest, size = tensor_file.write(path, {"w": np.array(values, np.float32), "a": np.zeros((2, 2), np.float32)})
    store.adopt(path, digest)
    outputs = {"0.1": BlobRef(digest=digest, size=size)}
    return Claim(worker, worker, "class", fence, outputs, {"0.1": 1.0}, {"tokens": 3, "loss_sum": 1.5}, 10.0 + fence)


@pytest.fixture
def dispute(store: BlobStore) -> Dispute:
    claims = (claim(store, "liar", 1, 1.0, 5.0), claim(store, "ann", 2, 1.0, 2.0), claim(store, "bob", 4, 1.0, 2.0))
    return Dispute(TASK, claims, counted=2, banned=(1,), note="the liar differs")


def read(folder: Path) -> dict[str, dict[str, object]]:
    evidence = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    assert evidence["task_id"] == TASK
    return {entry["worker"]: entry for entry in evidence["claims"]}


def test_both_results_outlive_their_blobs(tmp_path: Path, store: BlobStore, dispute: Dispute) -> None:
    for _ in range(2):
        folder = keep_evidence(tmp_path, store, dispute)
    for digest in store.digests():
        store.delete(digest)
    assert folder == evidence_dir(tmp_path, TASK) == tmp_path / "evidence" / "train-TRAIN-3-1"
    assert tensor_file.read(folder / "1-0.1.safetensors")["w"].tolist() == [1.0, 5.0]
    assert tensor_file.read(folder / "2-0.1.safetensors")["w"].tolist() == [1.0, 2.0]
    entries = read(folder)
    assert entries["liar"]["digests"] == {"0.1": dispute.claims[0].outputs["0.1"].digest}
    assert [entries[name]["banned"] for name in ("liar", "ann", "bob")] == [True, False, False]
    assert [entries[name]["counted"] for name in ("liar", "ann", "bob")] == [False, True, False]
    assert entries["ann"]["result"] == {"tokens": 3, "loss_sum": 1.5}


def test_how_far_the_results_are_apart_is_added(tmp_path: Path, store: BlobStore, dispute: Dispute) -> None:
    folder = keep_evidence(tmp_path, store, dispute)
    assert "differences" not in read(folder)["liar"]
    measure_evidence(folder, dispute)
    entries = read(folder)
    assert entries["liar"]["differences"] == {"0.1": {"max": 3.0, "norm": 3.0}}
    assert "differences" not in entries["bob"]
    assert difference(folder / "2-0.1.safetensors", folder / "4-0.1.safetensors") == {"max": 0.0, "norm": 0.0}


def test_evidence_that_was_moved_away_disturbs_nothing(tmp_path: Path, store: BlobStore, dispute: Dispute) -> None:
    folder = keep_evidence(tmp_path, store, dispute)
    (folder / "1-0.1.safetensors").unlink()
    measure_evidence(folder, dispute)
    assert "differences" not in read(folder)["liar"]


def test_of_a_suspicion_numbers_are_kept_and_no_tensors(tmp_path: Path, store: BlobStore, dispute: Dispute) -> None:
    """Quarantine may happen often: a worker whose norms are odd must not fill the disk."""
    folder = keep_evidence(tmp_path, store, replace(dispute, banned=()))
    assert [path.name for path in folder.iterdir()] == ["evidence.json"]


def test_where_there_are_no_links_the_bytes_are_copied(
    tmp_path: Path, store: BlobStore, dispute: Dispute, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    folder = keep_evidence(tmp_path, store, dispute)
    assert tensor_file.read(folder / "1-0.1.safetensors")["w"].tolist() == [1.0, 5.0]


def test_a_copy_that_is_cut_off_is_made_again(
    tmp_path: Path, store: BlobStore, dispute: Dispute, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    def cut(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", refuse)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfile", cut)
        with pytest.raises(KeyboardInterrupt):
            keep_evidence(tmp_path, store, dispute)
    folder = evidence_dir(tmp_path, TASK)
    assert not list(folder.glob("*.safetensors"))
    keep_evidence(tmp_path, store, dispute)
    assert tensor_file.read(folder / "1-0.1.safetensors")["w"].tolist() == [1.0, 5.0]
    assert not list(folder.glob("*.new"))


def test_another_result_of_the_same_lease_takes_the_place_of_the_first(
    tmp_path: Path, store: BlobStore, dispute: Dispute
) -> None:
    keep_evidence(tmp_path, store, dispute)
    claims = (claim(store, "liar", 1, 1.0, 7.0), *dispute.claims[1:])
    folder = keep_evidence(tmp_path, store, replace(dispute, claims=claims))
    assert tensor_file.read(folder / "1-0.1.safetensors")["w"].tolist() == [1.0, 7.0]
    assert not list(folder.glob("*.new"))
