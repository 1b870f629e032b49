"""Bytes are counted by what they were."""

from __future__ import annotations

from coordinator.state import Best, Module, Shard, State, Task
from coordinator.traffic import Traffic
from protocol.tasks import BlobRef, Checkpoint, EvaluateSpec, ModuleRef, Numerics, PathRef

MODULE, INNER, TOKENS, PROGRESS = (BlobRef(digest=letter * 64, size=1) for letter in "abcd")
CHECKPOINT = Checkpoint(blob=PROGRESS, steps=1, tokens=1, sequences=1, loss_sum=1.0, step_losses=[1.0], seconds=1.0)


def test_bytes_are_counted_by_what_they_were() -> None:
    state = State([Module("mixture", "0.0", 1, MODULE), Shard("mixture", 0, 0, (TOKENS,), 1, 1, inner_state=INNER)])
    state.apply([Task("train/TRAIN/0/0", "train", "TRAIN", 0, "0", checkpoint=CHECKPOINT)])
    traffic = Traffic(state)
    for digest, num_bytes in ((MODULE.digest, 1), (INNER.digest, 20), (TOKENS.digest, 300), (PROGRESS.digest, 7)):
        traffic.fetched(digest, num_bytes)
    for kind, num_bytes in (("module", 4000), ("inner_state", 50000), ("checkpoint", 80), ("record", 600000)):
        traffic.uploaded(kind, num_bytes)
    assert state.standing.bytes_moved == {
        "modules": 1,
        "outer_gradients": 4000,
        "inner_state": 50020,
        "checkpoints": 87,
        "other": 600300,
    }


def test_an_older_version_counts_as_a_module_while_it_is_best_or_measured() -> None:
    best, measured = (ModuleRef(module_id="0.0", version=1, blob=blob) for blob in (MODULE, INNER))
    path = PathRef(model="mixture", path_index=0, modules=[measured])
    spec = EvaluateSpec(path=path, tokens=TOKENS, prefix_tokens=1, chunk_tokens=1, numerics=Numerics())
    stop = Task("train/STOP/1/0-1", "train", "STOP", 1, "0-1", spec=spec.model_dump(mode="json"))
    traffic = Traffic(state := State([Best(0, 0, (best,), 1.0, 1), stop]))
    for digest, num_bytes in ((MODULE.digest, 1), (INNER.digest, 20), (TOKENS.digest, 300)):
        traffic.fetched(digest, num_bytes)
    assert state.standing.bytes_moved == {"modules": 21, "other": 300}
