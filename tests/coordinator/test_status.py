"""What a status tells of workers, and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path

from coordinator.plan import Plan
from coordinator.state import State, Worker
from coordinator.status import Tally, status_of
from protocol.tasks import Capabilities
from tests.played_run import config_of

OFFER = Capabilities(devices=["cpu"], memory_bytes=1 << 30, threads=1, fingerprint="class")


def test_a_worker_is_shown_by_its_name_and_its_id_is_told_to_nobody(tmp_path: Path) -> None:
    state = State([])
    state.workers["w0123456789ab"] = Worker("w0123456789ab", "alpha:7", OFFER, last_seen_s=2.0)
    status = status_of(Plan(config_of(tmp_path)), state, Tally(), 5.0)
    assert [(worker["name"], worker["last_seen_s"]) for worker in status["workers"]] == [("alpha:7", 3.0)]
    assert "w0123456789ab" not in json.dumps(status)
