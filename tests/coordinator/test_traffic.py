"""Bytes are counted by what they were."""

from __future__ import annotations

from coordinator.state import Module, Shard, State, Task
from coordinator.traffic import Traffic
from protocol.tasks import BlobRef, Checkpoint

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
