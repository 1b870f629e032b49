"""Who waits, who has a slot, who is run next: no tensor, thread or clock.

First come, first served into slots. Between decoding steps one piece of one text is prefilled. Where the modules of all
texts do not fit in memory together, those that fit are decoded for some steps, then the others have their turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from inference.stream import Stream


class Full(RuntimeError):
    """The queue is at its limit, or the engine ends."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`running` texts have a slot each, `waiting` more may queue.

    A prompt is read in pieces of `chunk_tokens`; `turn_steps`: decoding steps before others have their turn.
    `by_path`: batch only texts of equal paths, as an engine that knows no modules would (to measure against).
    """

    running: int = 16
    waiting: int = 64
    chunk_tokens: int = 256
    turn_steps: int = 32
    by_path: bool = False

    def __post_init__(self) -> None:
        for name in ("running", "chunk_tokens", "turn_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.waiting < 0:
            raise ValueError(f"waiting is {self.waiting}, expected at least 0")


class Schedule:
    """The texts of one engine."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self.waiting: deque[Stream] = deque()
        self._running: list[Stream] = []  # in the order of their turns
        self._reading: deque[Stream] = deque()
        self._free = list(range(limits.running))
        self._turn_steps = 0

    @property
    def running(self) -> tuple[Stream, ...]:
        """Those with a slot."""
        return tuple(self._running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self._running)

    def add(self, stream: Stream) -> None:
        """Queue a text; raises Full. Free slots count as room: they are filled before the next step."""
        if len(self.waiting) >= self._limits.waiting + len(self._free):
            raise Full(f"{len(self.waiting)} texts wait already; try again later")
        self.waiting.append(stream)

    def join(self) -> list[Stream]:
        """Give free slots, lowest first, to those that wait longest; returns who got one."""
        joined = []
        while self.waiting and self._free:
            stream = self.waiting.popleft()
            stream.slot = self._free.pop(0)
            self._running.append(stream)
            joined.append(stream)
        return joined

    def read(self, stream: Stream) -> None:
        """The text has pending tokens from now on."""
        self._reading.append(stream)

    def leave(self, stream: Stream) -> None:
        """The text is at its end, or unwanted; nothing happens where it is not here."""
        if stream in self._running:
            self._running.remove(stream)
            self._free = sorted([*self._free, stream.slot])
            if stream in self._reading:
                self._reading.remove(stream)
        elif stream in self.waiting:
            self.waiting.remove(stream)

    def clear(self) -> None:
        """Nothing is here any more: what comes after it is the end."""
        self.waiting.clear()
        self._running.clear()
        self._reading.clear()

    def next_piece(self) -> tuple[Stream, int] | None:
        """A text with pending tokens, and up to which one it is run now; a long prompt lets shorter ones pass."""
        while self._reading:
            stream = self._reading.popleft()
            if stream.pending is None:
                continue
            end = min(len(stream.context), stream.pending.begin + self._limits.chunk_tokens)
            if end < len(stream.context):
                self._reading.append(stream)
            return stream, end
        return None

    def turn(self, module_bytes: Callable[[Stream], dict[str, int]], budget_bytes: int) -> list[Stream]:
        """Who is decoded in this step: those whose modules fit in memory together, at least one; by slot."""
        ready = [stream for stream in self._running if stream.pending is None]
        chosen: list[Stream] = []
        modules: dict[str, int] = {}
        for stream in ready:
            together = modules | module_bytes(stream)
            if not chosen or sum(together.values()) <= budget_bytes:
                chosen.append(stream)
                modules = together
        if len(chosen) < len(ready):
            self._pass_on(chosen)
        return sorted(chosen, key=lambda stream: stream.slot)

    def _pass_on(self, chosen: list[Stream]) -> None:
        self._turn_steps += 1
        if self._turn_steps >= self._limits.turn_steps:
            self._turn_steps = 0
            self._running = [stream for stream in self._running if stream not in chosen] + chosen
