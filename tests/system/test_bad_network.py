"""A run whose worker has only a bad network, which cuts, stalls and parts, ends with the same bits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.proxy import Faults, Proxy
from tests.small_run import PATIENCE_S, SmallRun, undisturbed_digest

# The run passes about a megabyte, so that connections last for a few calls each.
CUTS = Faults(cut_after_bytes=(20_000, 120_000), delay_s=0.001, stall_s=0.1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    made = SmallRun(tmp_path / "small")
    made.start()
    return made


def test_connections_that_are_cut_at_random(run: SmallRun, expected: str) -> None:
    with Proxy(run.address, CUTS, seed=1) as proxy:
        run.worker(proxy.address).run()
        assert run.digest() == expected
        assert proxy.cuts >= 3


def test_a_partition_of_three_seconds(run: SmallRun, expected: str) -> None:
    over = threading.Event()
    with Proxy(run.address, Faults()) as proxy:
        worker = run.worker(proxy.address)
        thread = threading.Thread(target=worker.run)
        thread.start()
        while proxy.passed_bytes < 100_000:
            assert thread.is_alive()
            over.wait(0.01)
        proxy.part(3.0, over.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert over.is_set()
    assert run.digest() == expected
