"""A run whose worker has only a bad network, which cuts, stalls, delays and parts, ends with the same bits."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from coordinator.snapshot import RunSnapshot
from dipaco.network import Network
from dipaco.relay import Relays
from tests.small_run import PATIENCE_S, SmallRun, undisturbed_digest
from worker.client import Lease, WorkerClient

# The run passes about a megabyte, so that connections last for a few calls each.
CUTS = (20_000, 120_000)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    made = SmallRun(tmp_path / "small")
    made.start()
    return made


def test_connections_that_are_cut_at_random(run: SmallRun, expected: str) -> None:
    with Relays(run.address, Network(latency_s=0.001, loss=0.01), seed=1, cut_after_bytes=CUTS) as relays:
        run.worker(relays.addresses[0]).run()
        assert run.digest() == expected
        assert relays.counts().cut_connections >= 3
        assert relays.counts().stalls >= 1


def test_a_partition_of_three_seconds(run: SmallRun, expected: str) -> None:
    with Relays(run.address, Network(), seed=0) as relays:
        worker = run.worker(relays.addresses[0])
        thread = threading.Thread(target=worker.run)
        thread.start()
        while relays.counts().passed_bytes < 100_000:
            assert thread.is_alive()
            thread.join(0.01)
        relays.part(0)
        passed = relays.counts().passed_bytes
        thread.join(3.0)
        assert thread.is_alive()
        assert relays.counts().passed_bytes == passed
        relays.heal(0)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert relays.counts().partitions == 1
    assert run.digest() == expected


def test_connections_that_are_reset_again_and_again(run: SmallRun, expected: str) -> None:
    """At random, since on a slow machine no fixed interval might be long enough for a connection and a call on it.

    Until the run is over: its coordinator waits for a moment only for those who did not hear of that.
    """
    intervals = random.Random(2)
    with Relays(run.address, Network(latency_s=0.02, jitter_s=0.01, rate_bits_per_s=20e6), seed=2) as relays:
        thread = threading.Thread(target=run.worker(relays.addresses[0]).run)
        thread.start()
        while thread.is_alive():
            thread.join(intervals.expovariate(1 / 0.5))
            if not RunSnapshot.open(run.run_dir).state.standing.finished:
                relays.drop(0)
        assert relays.counts().cut_connections >= 3
    assert run.digest() == expected


def test_the_answer_that_the_run_is_over_is_lost(run: SmallRun, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = WorkerClient.lease
    lost: list[Lease] = []

    def lossy(client: WorkerClient, *args: Any) -> Lease:
        answer = lease(client, *args)
        if not answer.finished or lost:
            return answer
        lost.append(answer)
        time.sleep(0.5)  # before it is asked for again
        monkeypatch.setattr(client, "_patience_s", PATIENCE_S)
        return lease(client, *args)

    monkeypatch.setattr(WorkerClient, "lease", lossy)
    run.worker().run()
    assert len(lost) == 1
    assert run.digest() == expected
