"""One step of an engine after the other: texts join, a piece of a prompt is read, a token of every text is written.

What goes wrong with one text ends that text alone. No thread and no clock: the shell is `batch_engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from inference.batch_forward import BatchForward, Row
from inference.engine import GeneratedToken
from inference.level_module import LevelModule
from inference.resident_modules import ResidentModules
from inference.schedule import BatchLimits, Schedule
from inference.slots import Slots
from inference.stream import Stream


@dataclass(frozen=True, slots=True)
class Event:
    """A token of a text, or why it ended without one."""

    stream: Stream
    outcome: GeneratedToken | Exception


@dataclass(slots=True)
class Counts:
    """Since the start, but `rows`: of the newest step."""

    rows: int = 0
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    switches: int = 0
    reprefilled_tokens: int = 0


class Stepper:
    """The texts of one engine and what runs them."""

    def __init__(self, modules: ResidentModules, limits: BatchLimits) -> None:
        self.schedule, self.modules, self.counts = Schedule(limits), modules, Counts()
        self.slots = Slots(modules.config, modules.topology, limits.running, modules.precision, modules.device)
        self._limits = limits
        self.forward = BatchForward(modules.config, modules.topology, self.slots)
        self._events: list[Event] = []
        self._joined: list[Stream] = []

    def take_events(self) -> list[Event]:
        """Those of the newest step, also of one that failed in the middle; once."""
        events, self._events = self._events, []
        return events

    def join(self) -> None:
        """Give free slots to those that wait; apart from `step`, so that a shell can hold its lock meanwhile."""
        self._joined += self.schedule.join()

    def drop(self, stream: Stream) -> None:
        """Between two steps: nobody wants the text any more."""
        self.schedule.leave(stream)
        if stream in self._joined:
            self._joined.remove(stream)
        if stream.slot >= 0:
            self.slots.clear(stream.slot, len(stream.text))

    def step(self) -> None:
        """Everything that is ready goes on by one token, and one text with tokens to be read by one piece."""
        self._events = []
        joined, self._joined = self._joined, []
        for stream in joined:
            self._guarded(self._begin, stream)
        self._read()
        self._write()

    def _guarded(self, act: Callable[..., None], stream: Stream, *arguments: object) -> None:
        """Carry out one act for one text; where it fails the text ends."""
        try:
            act(stream, *arguments)
        except Exception as error:
            self.drop(stream)
            self._events.append(Event(stream, error))

    def _begin(self, stream: Stream) -> None:
        stream.route()
        self.counts.prompt_tokens += len(stream.context)
        self.schedule.read(stream)

    def _read(self) -> None:
        piece = self.schedule.next_piece()
        if piece is not None:
            self._guarded(self._read_piece, *piece)

    def _read_piece(self, stream: Stream, end: int) -> None:
        pending = stream.pending
        assert pending is not None
        modules = self.modules_of(stream)
        if pending.first < self.modules.config.blocks:
            tokens = stream.context[pending.begin : end]
            self.forward.prefill(stream.slot, tokens, pending.first, pending.begin, modules)
            self.counts.reprefilled_tokens += len(tokens) if pending.again else 0
        stream.ran(end)
        if stream.pending is None:
            self._go_on(stream, self.forward.scores(stream.slot, modules))

    def _write(self) -> None:
        rows = self._rows(self.schedule.turn(self._module_bytes, self.modules.budget_bytes))
        self.counts.rows = len(rows)
        if not rows:
            return
        self.counts.steps += 1
        try:
            scores = self._decode([row for _, row in rows])
        except Exception:
            for stream, row in rows:  # one by one, so that only the one at fault ends
                self._guarded(self._write_alone, stream, row)
            return
        for (stream, _), found in zip(rows, scores, strict=True):
            self._guarded(self._go_on, stream, found)

    def _write_alone(self, stream: Stream, row: Row) -> None:
        self._go_on(stream, self.forward.decode([row])[0])

    def _decode(self, rows: Sequence[Row]) -> Sequence[np.ndarray]:
        if not self._limits.by_path:
            return list(self.forward.decode(rows))
        scores: dict[int, np.ndarray] = {}
        for digests in dict.fromkeys(row.digests for row in rows):
            members = [row for row in rows if row.digests == digests]
            scores |= zip((row.slot for row in members), self.forward.decode(members), strict=True)
        return [scores[row.slot] for row in rows]

    def _rows(self, streams: Sequence[Stream]) -> list[tuple[Stream, Row]]:
        rows: list[tuple[Stream, Row]] = []
        for stream in streams:
            self._guarded(self._add_row, stream, rows)
        return rows

    def _add_row(self, stream: Stream, rows: list[tuple[Stream, Row]]) -> None:
        position = len(stream.context) - 1
        modules = self.modules_of(stream)
        rows.append((stream, Row(stream.slot, position, stream.context[-1], stream.digests, modules)))

    def _go_on(self, stream: Stream, scores: np.ndarray) -> None:
        """All of the context is read and scored: look at the route, and write a token unless the path changed."""
        if stream.written and stream.path_index is not None:
            former = stream.path_index
            changed = stream.route()
            self.counts.switches += stream.path_index != former
            if changed:
                self.schedule.read(stream)
                return
        token = stream.take(scores)
        self.counts.tokens += 1
        if token.finish is not None:
            self.schedule.leave(stream)
        elif stream.pending is not None:
            self.schedule.read(stream)
        self._events.append(Event(stream, token))

    def modules_of(self, stream: Stream) -> tuple[LevelModule, ...]:
        """The modules of the path that the text goes on with, read where they are not in memory."""
        assert stream.path_index is not None
        ids = self.modules.topology.modules_of_path(stream.path_index)
        return tuple(
            self.modules.get(level, module_id, digest)
            for level, (module_id, digest) in enumerate(zip(ids, stream.digests, strict=True))
        )

    def _module_bytes(self, stream: Stream) -> dict[str, int]:
        return dict(zip(stream.digests, self.modules.level_bytes, strict=True))
