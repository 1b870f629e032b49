"""The engine that servers use: texts of many paths in one batch, in a thread of its own.

`emit` and `failed` are called from that thread, the one for every token in order, the other at most once and last.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from inference.engine import GeneratedToken, Request
from inference.path_source import PathSource
from inference.precision import Precision
from inference.resident_modules import ResidentModules
from inference.schedule import BatchLimits, Full
from inference.stepper import Event, Stepper
from inference.stream import Reading, Served, Stream
from routing.router import Router

__all__ = ["BatchEngine", "BatchLimits", "EngineBroken", "EngineStats", "Full", "Ticket"]

logger = logging.getLogger(__name__)


class EngineBroken(RuntimeError):
    """The engine met an error that it could not get over, and writes nothing any more."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Since the start; `running`, `waiting`, `rows` (of the newest step), bytes and `snapshots` as of now.

    `broken`: it takes no text any more and has failed those that it had.
    """

    running: int = 0
    waiting: int = 0
    rows: int = 0
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    switches: int = 0
    reprefilled_tokens: int = 0
    cache_reads: int = 0
    cache_hits: int = 0
    cache_bytes: int = 0
    slot_bytes: int = 0
    snapshots: int = 1
    broken: bool = False


@dataclass(eq=False)
class Ticket:
    """One generation that was asked for."""

    emit: Callable[[GeneratedToken], None]
    failed: Callable[[Exception], None]
    stream: Stream
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def path_index(self) -> int | None:
        """The path that writes now; None before the router was asked."""
        return self.stream.path_index

    def cancel(self) -> None:
        """Nobody wants the rest: nothing is emitted after the step under way, and the slot is free before the next."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


class BatchEngine:
    """Paths of one model out of one store, whatever snapshots of them follow one another."""

    def __init__(
        self,
        paths: PathSource,
        router: Router,
        reading: Reading,
        router_lm: Router | None = None,
        limits: BatchLimits | None = None,
        precision: Precision = "float32",
    ) -> None:
        """Modules are kept in as many bytes as `paths.cache` may hold; slots are apart from that (`slot_bytes`)."""
        modules = ResidentModules(
            paths.cache.store,
            paths.config,
            paths.vocab_size,
            paths.topology,
            paths.cache.budget_bytes,
            precision,
            paths.device,
        )
        self._reading, self._served = reading, Served(paths, router, router_lm)
        self._stepper = Stepper(modules, limits or BatchLimits())
        self._changed = threading.Condition()
        self._tickets: dict[Stream, Ticket] = {}
        self._closing = self._cut = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="batch-engine", daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, emit: Callable[[GeneratedToken], None], failed: Callable[[Exception], None]
    ) -> Ticket:
        """Ask for a generation; raises PromptTooLong, UnknownPath, NoRouterLM, UnknownToken, Full and EngineBroken."""
        with self._changed:
            if self._broken is not None:
                raise _broken_by(self._broken)
            stream = Stream(request, self._served, self._reading)
            self._forget_cancelled(waiting_only=True)
            if self._closing:
                raise Full("the engine ends; ask elsewhere or after its restart")
            self._stepper.schedule.add(stream)
            ticket = self._tickets[stream] = Ticket(emit, failed, stream)
            self._changed.notify_all()
        return ticket

    def renew(self, paths: PathSource, router: Router, router_lm: Router | None = None) -> None:
        """New texts are of these paths; those that were asked for before keep theirs. Raises ValueError."""
        with self._changed:
            now = self._served.paths
            if (paths.config, paths.vocab_size, paths.topology) != (now.config, now.vocab_size, now.topology):
                raise ValueError("the newer snapshot is of another model; start an engine for it")
            self._served = Served(paths, router, router_lm)

    def close(self, drain: bool = True) -> None:
        """End the thread, after all that was asked for is written, or (`drain=False`) after the step under way."""
        with self._changed:
            self._closing, self._cut = True, self._cut or not drain
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        """As of now."""
        with self._changed:
            stepper, counts = self._stepper, self._stepper.counts
            leaving = sum(ticket.is_cancelled and stream.slot < 0 for stream, ticket in self._tickets.items())
            return EngineStats(
                running=len(stepper.schedule.running),
                waiting=len(stepper.schedule.waiting) - leaving,
                rows=counts.rows,
                steps=counts.steps,
                tokens=counts.tokens,
                prompt_tokens=counts.prompt_tokens,
                switches=counts.switches,
                reprefilled_tokens=counts.reprefilled_tokens,
                cache_reads=stepper.modules.reads,
                cache_hits=stepper.modules.hits,
                cache_bytes=stepper.modules.num_bytes,
                slot_bytes=stepper.slots.num_bytes,
                snapshots=len({id(self._served)} | {id(stream.served) for stream in self._tickets}),
                broken=self._broken is not None,
            )

    def _work(self) -> None:
        try:
            while self._wait():
                self._step()
        except BaseException as error:  # whatever it is, nobody may wait for a thread that has ended
            logger.critical("the engine failed and writes nothing any more", exc_info=error)
            with self._changed:
                self._broken = error
                self._stepper.schedule.clear()
        with self._changed:
            left, self._tickets = list(self._tickets.values()), {}
        for ticket in left:
            if not ticket.is_cancelled:
                closed = Full("the engine was closed before the text was written")
                _fail(ticket, closed if self._broken is None else _broken_by(self._broken))

    def _step(self) -> None:
        """A step, told; where it fails as a whole, which is a defect, its texts end and the engine goes on.

        What the step did before it failed is told first. Raises where the slots of those texts cannot be taken back.
        """
        failure: Exception | None = None
        try:
            self._stepper.step()
        except Exception as error:
            failure = error
        for event in self._stepper.take_events():
            self._tell(event)
        if failure is None:
            return
        with self._changed:
            lost = [stream for stream in self._tickets if stream not in self._stepper.schedule.waiting]
        for stream in lost:
            self._stepper.drop(stream)
            self._tell(Event(stream, failure))

    def _wait(self) -> bool:
        """Let cancelled texts go and others join, waiting until there is something to do. False: the thread ends."""
        with self._changed:
            self._forget_cancelled()
            while self._stepper.schedule.idle and not self._closing:
                self._changed.wait()
            self._stepper.join()
            return not self._cut and not self._stepper.schedule.idle

    def _forget_cancelled(self, waiting_only: bool = False) -> None:
        """Slots are taken back only between steps, by the engine's own thread."""
        for stream in [stream for stream, ticket in self._tickets.items() if ticket.is_cancelled]:
            if stream.slot < 0 or not waiting_only:
                self._stepper.drop(stream)
                del self._tickets[stream]

    def _tell(self, event: Event) -> None:
        ticket = self._tickets.get(event.stream)
        if ticket is None or ticket.is_cancelled:
            return
        outcome = event.outcome
        if isinstance(outcome, Exception) or outcome.finish is not None:
            with self._changed:
                del self._tickets[event.stream]
        if isinstance(outcome, Exception):
            _fail(ticket, outcome)
            return
        try:
            ticket.emit(outcome)
        except Exception as error:
            ticket.cancel()
            _fail(ticket, error)


def _broken_by(error: BaseException) -> EngineBroken:
    """One for each who hears of it."""
    return EngineBroken(f"the engine failed ({type(error).__name__}: {error}) and writes nothing any more; restart it")


def _fail(ticket: Ticket, error: Exception) -> None:
    """A callback that fails, too, harms nobody else."""
    with contextlib.suppress(Exception):
        ticket.failed(error)
