"""Several generations side by side in one thread, a token each in turn; more wait in a queue that is bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from inference.engine import Engine, GeneratedToken, Request
from inference.path_source import PathSource
from routing.router import Router


class Full(RuntimeError):
    """The queue is at its limit, or the engine ends."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Numbers since the start, but `running`, `waiting` and `rows` (generations in the last step) of now."""

    running: int = 0
    waiting: int = 0
    rows: int = 0
    tokens: int = 0
    switches: int = 0
    reprefilled_tokens: int = 0
    cache_reads: int = 0
    cache_hits: int = 0
    cache_bytes: int = 0


@dataclass(eq=False)
class Ticket:
    """One generation that was asked for."""

    request: Request
    emit: Callable[[GeneratedToken], None]
    failed: Callable[[Exception], None]
    steps: Iterator[GeneratedToken]
    path_index: int | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody wants the rest; the place is free before the next token."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


class ThreadEngine:
    """Owns a thread that computes; `emit` and `failed` are called from it."""

    def __init__(
        self,
        paths: PathSource,
        router: Router,
        prefix_tokens: int,
        bos_id: int,
        eos_id: int,
        router_lm: Router | None = None,
        max_running: int = 16,
        max_waiting: int = 64,
    ) -> None:
        self._of = (prefix_tokens, bos_id, eos_id)
        self._engine = Engine(paths, router, *self._of, router_lm=router_lm)
        self._max_running, self._max_waiting = max_running, max_waiting
        self._changed = threading.Condition()
        self._running: list[Ticket] = []
        self._waiting: deque[Ticket] = deque()
        self._tokens = self._switches = 0
        self._closing = self._cut = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, emit: Callable[[GeneratedToken], None], failed: Callable[[Exception], None]
    ) -> Ticket:
        """Ask for a generation; raises Full."""
        with self._changed:
            self._forget_cancelled()
            if self._closing or len(self._waiting) >= self._max_waiting:
                raise Full(f"{len(self._waiting)} generations wait already; try again later")
            ticket = Ticket(request, emit, failed, self._engine.generate(request))
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def renew(self, paths: PathSource, router: Router, router_lm: Router | None = None) -> None:
        """New generations are of these paths; those that were asked for before keep theirs."""
        with self._changed:
            self._engine = Engine(paths, router, *self._of, router_lm=router_lm)

    def close(self, drain: bool = True) -> None:
        """End the thread, after all that was asked for is written, or (`drain=False`) at once."""
        with self._changed:
            self._closing, self._cut = True, not drain
            self._changed.notify_all()
        self._thread.join()

    def stats(self) -> EngineStats:
        """As of now."""
        with self._changed:
            running = len(self._running)
            return EngineStats(running, len(self._waiting), running, self._tokens, self._switches)

    def _work(self) -> None:
        while self._admit():
            for ticket in list(self._running):
                if ticket.is_cancelled or not self._step(ticket):
                    with self._changed:
                        self._running.remove(ticket)
        for ticket in (*self._running, *self._waiting):
            ticket.failed(Full("the engine was closed before the text was written"))

    def _admit(self) -> bool:
        """Fill free places from the queue; waits while there is nothing to do. False: the thread ends."""
        with self._changed:
            self._forget_cancelled()
            while not (self._running or self._waiting or self._closing):
                self._changed.wait()
            while self._waiting and len(self._running) < self._max_running:
                self._running.append(self._waiting.popleft())
            return bool(self._running) and not self._cut

    def _forget_cancelled(self) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)

    def _step(self, ticket: Ticket) -> bool:
        """One token; False where it was the last."""
        try:
            token = next(ticket.steps)
        except Exception as error:
            ticket.failed(error)
            return False
        self._tokens += 1
        self._switches += ticket.path_index not in (None, token.path_index)
        ticket.path_index = token.path_index
        ticket.emit(token)
        return token.finish is None
