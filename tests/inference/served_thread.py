"""A server that runs in the loop of a thread of its own while it is entered."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

PATIENCE_S = 60.0


class ServedThread(ABC):
    """`whole`: once it has ended, whether all was answered. Whoever serves sets `ready` when the doors are open."""

    def __init__(self) -> None:
        self.whole: bool | None = None
        self.ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)

    @abstractmethod
    async def serve(self) -> None:
        """Open, set `ready`, wait to be stopped, close, set `whole`."""

    @abstractmethod
    def stop(self) -> None:
        """As the first signal does."""

    @abstractmethod
    def cut(self) -> None:
        """As the second signal does."""

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition."""
        pause, waited = threading.Event(), 0.0
        while not condition():
            assert waited < PATIENCE_S, f"waited in vain for {self}"
            pause.wait(0.01)
            waited += 0.01

    def joined(self) -> bool:
        """Wait for the end; whether all was answered."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert self.whole is not None
        return self.whole

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.ready.wait(PATIENCE_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread.is_alive():
            self.stop()
            self.cut()
        self.joined()
