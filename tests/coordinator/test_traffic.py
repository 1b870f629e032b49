"""Bytes are counted by what they were."""

from __future__ import annotations

from coordinator.state import Module, Shard, State
from coordinator.traffic import Traffic
from protocol.tasks import BlobRef

MODULE, INNER, TOKENS = (BlobRef(digest=letter * 64, size=1) for letter in "abc")


def test_bytes_are_counted_by_what_they_were() -> None:
    state = State([Module("mixture", "0.0", 1, MODULE), Shard("mixture", 0, 0, (TOKENS,), 1, 1, inner_state=INNER)])
    traffic = Traffic(state)
    for digest, num_bytes in ((MODULE.digest, 1), (INNER.digest, 20), (TOKENS.digest, 300)):
        traffic.fetched(digest, num_bytes)
    for kind, num_bytes in (("module", 4000), ("inner_state", 50000), ("record", 600000)):
        traffic.uploaded(kind, num_bytes)
    assert state.standing.bytes_moved == {
        "modules": 1,
        "outer_gradients": 4000,
        "inner_state": 50020,
        "other": 600300,
    }
