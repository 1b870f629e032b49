"""A server that follows its run: looks that fail are told, tried again, and never ended in the middle."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

from dipaco.following import Following
from inference.metrics import ServerMetrics

TAKEN = SimpleNamespace(name="snapshot-1", paths=object(), router=object(), router_lm=None, has_router=True)


class Scene:
    """A run and an engine of which the test says what they do."""

    def __init__(self, *looks: Any, renewals: tuple[Exception | None, ...] = ()) -> None:
        self.looks, self.renewals, self.now_s = list(looks), list(renewals), 0.0
        self.renewed: list[Any] = []
        self.said: list[str] = []
        self.metrics = ServerMetrics(clock=lambda: self.now_s)
        self.model = SimpleNamespace(snapshot="snapshot-0", has_router=False, has_router_lm=False)

    def take(self) -> Any:
        self.now_s += 10.0
        found = self.looks.pop(0) if self.looks else None
        if isinstance(found, Exception):
            raise found
        return found() if callable(found) else found

    def renew(self, paths: object, router: object, router_lm: object) -> None:
        error = self.renewals.pop(0) if self.renewals else None
        if error is not None:
            raise error
        self.renewed.append(paths)

    def start(self) -> Following:
        answering: Any = SimpleNamespace(model=self.model, metrics=self.metrics)
        scene: Any = self
        return Following(scene, scene, answering, 0.001, self.said.append)

    def follow_until(self, condition: Callable[[], bool]) -> None:
        async def follow() -> None:
            following = self.start()
            async with asyncio.timeout(60):
                while not condition():
                    await asyncio.sleep(0.001)
            await following.stop()

        asyncio.run(follow())

    def number(self, name: str) -> float:
        page = self.metrics.page().decode()
        return float(next(line.split()[1] for line in page.splitlines() if line.startswith(f"{name} ")))


def test_trouble_with_the_journal_is_told_once_and_looked_at_again(caplog: pytest.LogCaptureFixture) -> None:
    locked = [sqlite3.OperationalError("database is locked") for _ in range(3)]
    scene = Scene(*locked, TAKEN)
    scene.follow_until(lambda: bool(scene.renewed))
    assert scene.said == [
        "the newest snapshot is not served: OperationalError: database is locked",
        "serving snapshot-1 from now on",
    ]
    assert scene.model.snapshot == "snapshot-1"
    assert scene.number("dipaco_failed_looks_total") == 3
    assert "a look at the run failed" in caplog.text


def test_a_snapshot_that_the_engine_refused_is_offered_again() -> None:
    scene = Scene(TAKEN, renewals=(ValueError("the newer snapshot is of another model"),))
    scene.follow_until(lambda: bool(scene.renewed))
    assert scene.said[0] == ("the newest snapshot is not served: ValueError: the newer snapshot is of another model")
    assert scene.model.snapshot == "snapshot-1"


def test_metrics_tell_how_old_the_snapshot_is_and_the_newest_look_that_went_well() -> None:
    scene = Scene(TAKEN, *[OSError("gone")] * 10_000)
    scene.follow_until(lambda: scene.number("dipaco_failed_looks_total") >= 3)
    assert scene.number("dipaco_look_age_seconds") == scene.now_s - 10.0
    assert scene.number("dipaco_snapshot_age_seconds") == scene.now_s - 10.0
    assert scene.number("dipaco_snapshots_total") == 1


def test_the_end_waits_for_the_look_under_way() -> None:
    began, release = threading.Event(), threading.Event()
    ended: list[bool] = []

    def slow() -> None:
        began.set()
        assert release.wait(60)
        ended.append(True)

    scene = Scene(slow)

    async def follow() -> None:
        following = scene.start()
        assert await asyncio.to_thread(began.wait, 60)
        stopping = asyncio.create_task(following.stop())
        await asyncio.sleep(0)
        assert not stopping.done()
        release.set()
        await stopping
        assert ended == [True]

    asyncio.run(follow())
