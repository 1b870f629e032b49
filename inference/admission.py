"""Who is let in: counts the requests that are being answered, bounds them, and lets nobody in while it drains.

For one event loop.
"""

from __future__ import annotations

import asyncio

from inference.request_errors import Busy, Draining


class Admission:
    """`limit`: requests at a time; None where something else bounds them."""

    def __init__(self, limit: int | None = None) -> None:
        self.draining = False
        self.open = 0
        self._limit = limit
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self) -> None:
        """Raises Draining, and Busy where the limit is reached."""
        if self.draining:
            raise Draining("the server is about to end and takes no new requests; ask another one", retry_after_s=5)
        if self._limit is not None and self.open >= self._limit:
            raise Busy(f"{self.open} requests are being answered, as many as may be at a time; come again")

    def enter(self) -> None:
        """One more; whoever was let in must `leave`. Raises Draining, Busy."""
        self.check()
        self.open += 1
        self._idle.clear()

    def leave(self) -> None:
        """One less."""
        self.open -= 1
        if not self.open:
            self._idle.set()

    def drain(self) -> None:
        """Let nobody in from now on."""
        self.draining = True

    async def until_idle(self) -> None:
        """Return when no request is being answered."""
        await self._idle.wait()
