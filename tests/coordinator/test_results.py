"""Results handed in more than once, side by side: one call of a lease after the other, and each tells the same."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from coordinator.spool import Spool
from tests.played_run import Played, config_of, played


class SlowCommits:
    """Moves into the store that end when they may; counts those under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moving, self.may_end = threading.Event(), threading.Event()
        self.calls, self.at_once, self._under_way = 0, 0, 0
        real = Spool.commit

        def slow(spool: Spool, *args: Any) -> None:
            self.calls += 1
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
            self.moving.set()
            assert self.may_end.wait(60)
            real(spool, *args)
            self._under_way -= 1

        monkeypatch.setattr(Spool, "commit", slow)


def test_a_repeated_completion_waits_for_the_one_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def opened() -> None:
        async with played(config_of(tmp_path), tmp_path / "run") as run:
            await script(run)

    async def script(run: Played) -> None:
        lease = await run.lease()
        outcome = run.compute(lease)
        await run.upload(lease, outcome)
        commits = SlowCommits(monkeypatch)
        first = asyncio.create_task(run.complete(lease, outcome))
        await run.until(commits.moving.is_set)
        second = asyncio.create_task(run.complete(lease, outcome))
        await asyncio.sleep(0.2)  # it would be in the spool by now
        commits.may_end.set()
        assert (await first, await second) == (False, True)
        assert (commits.calls, commits.at_once) == (1, 1)
        assert not list((run.run_dir / "spool").iterdir())

    asyncio.run(opened())
