"""Hands a run's newer snapshots to the engine of a server, and tells how old the served one is.

Whatever goes wrong with a look is said once and looked at again: a server never stays behind in silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from dipaco.ending import sentence
from dipaco.followed_run import FollowedRun, Taken
from inference.answering import Answering
from inference.batch_engine import BatchEngine

logger = logging.getLogger(__name__)


class Following:
    """Looks every `look_s` seconds until it is told to stop; for one event loop."""

    def __init__(
        self,
        run: FollowedRun,
        engine: BatchEngine,
        answering: Answering,
        look_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._engine, self._answering, self._look_s, self._say = run, engine, answering, look_s, say
        self._stopping = asyncio.Event()
        self._pending: Taken | None = None  # taken from the run and not yet by the engine
        self._trouble = ""
        self._task = asyncio.create_task(self._look_on())

    async def stop(self) -> None:
        """No more looks; returns when the one under way, and its thread, have ended."""
        self._stopping.set()
        await self._task

    async def _look_on(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._look_s)
            if self._stopping.is_set():
                return
            try:
                await self._look()
            except Exception as error:
                self._answering.metrics.looked(failed=True)
                self._tell(error)
            else:
                self._answering.metrics.looked(failed=False)
                self._trouble = ""

    async def _look(self) -> None:
        """Raises what the run and the engine do."""
        self._pending = await asyncio.to_thread(self._run.take) or self._pending
        if self._pending is None:
            return
        name, has_router = self._pending.name, self._pending.has_router
        has_router_lm = self._pending.router_lm is not None
        self._engine.renew(self._pending.paths, self._pending.router, self._pending.router_lm)
        self._pending = None  # the engine holds its paths, and nobody else
        model = self._answering.model
        model.snapshot, model.has_router, model.has_router_lm = name, has_router, has_router_lm
        self._answering.metrics.renewed()
        self._say(f"serving {name} from now on")

    def _tell(self, error: Exception) -> None:
        known = sentence(error)
        told = known or f"{type(error).__name__}: {error}"
        if told == self._trouble:
            return
        self._trouble = told
        self._say(f"the newest snapshot is not served: {told}")
        if known is None:
            logger.error("a look at the run failed", exc_info=error)
