"""A second connection of a worker, opened when it is first used, which any thread may end for ever."""

from __future__ import annotations

import threading

from protocol.errors import Unavailable
from worker.calls import Connect, Coordinator


class SideLine:
    """Calls beside those of the main connection. `patience_s`: how long each is tried while nobody answers."""

    def __init__(self, connect: Connect, patience_s: float) -> None:
        self._connect, self._patience_s = connect, patience_s
        self._lock = threading.Lock()
        self._client: Coordinator | None = None
        self._closed = False

    def client(self) -> Coordinator:
        """The connection; raises Unavailable once it is closed."""
        with self._lock:
            if self._closed:
                raise Unavailable("the task is over")
            if self._client is None:
                self._client = self._connect(self._patience_s)
            return self._client

    def close(self) -> None:
        """End the calls under way and every later one."""
        with self._lock:
            self._closed = True
            if self._client is not None:
                self._client.close()
