"""From a request to its texts: checks it, hands its generations to the engine, and yields pieces of text as they come.

The one place between the servers (HTTP, gRPC) and the engine, for one event loop. Whoever stops listening frees the
places of the request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from inference.admission import Admission
from inference.batch_engine import EngineBroken, EngineStats, Full
from inference.engine import Finish, GeneratedToken, Request
from inference.metrics import ServerMetrics
from inference.openai_requests import Asked
from inference.request_errors import BadRequest, Busy, EngineFailed, NotReady, status_of
from inference.served_model import Limits, Routing, ServedModel
from inference.text_stream import TextStream

logger = logging.getLogger(__name__)

BROKEN = "the engine failed and writes nothing any more; the log of the server says why: restart it"
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd: the texts of one request have seeds of their own, the first the seed itself


class Ticket(Protocol):
    """A generation in the engine."""

    def cancel(self) -> None: ...


class TextEngine(Protocol):
    """What this needs of an engine."""

    def submit(
        self, request: Request, emit: Callable[[GeneratedToken], None], failed: Callable[[Exception], None]
    ) -> Ticket: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one path."""

    path: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of the text `index`, and the path that wrote its last token. `finish` on the last piece."""

    index: int
    text: str
    path: str
    finish: Finish | None = None


@dataclass
class _Text:
    """One text while it is written."""

    stream: TextStream
    ticket: Ticket | None = None
    tokens: int = 0
    over: bool = False
    newest_s: float = 0.0
    segments: list[Segment] = field(default_factory=list)

    def count(self, path: str) -> None:
        self.tokens += 1
        if self.segments and self.segments[-1].path == path:
            self.segments[-1] = Segment(path, self.segments[-1].tokens + 1)
        else:
            self.segments.append(Segment(path, 1))


class Answer:
    """The texts of one request, prompt by prompt, `n` each. Iterate `pieces`; `close` it whatever happens."""

    def __init__(
        self, asked: Asked, routing: Routing, model: ServedModel, metrics: ServerMetrics, on_close: Callable[[], None]
    ) -> None:
        self.asked, self.routing, self.snapshot = asked, routing, model.snapshot
        self.prompt_tokens = 0
        self._model, self._metrics, self._on_close = model, metrics, on_close
        self._began_s = metrics.clock()
        self._texts = [
            _Text(TextStream(model.tokenizer.decode, asked.stop)) for _ in range(len(asked.prompts) * asked.n)
        ]
        self._events: asyncio.Queue[tuple[int, GeneratedToken | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @property
    def completion_tokens(self) -> int:
        return sum(text.tokens for text in self._texts)

    def segments(self, index: int) -> tuple[Segment, ...]:
        """The paths of a text so far."""
        return tuple(self._texts[index].segments)

    def ask(self, engine: TextEngine, index: int, request: Request) -> None:
        """Start a text; raises what the engine does."""

        def hear(event: GeneratedToken | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._texts[index].ticket = engine.submit(request, hear, hear)

    async def pieces(self) -> AsyncIterator[Piece]:
        """All texts, interleaved as they are written; raises EngineFailed, Busy and what the engine does."""
        left = len(self._texts)
        while left:
            index, event = await self._events.get()
            text = self._texts[index]
            if text.over:
                continue
            if isinstance(event, Exception):
                raise _translated(event)
            piece = self._piece(index, text, event)
            left -= piece.finish is not None
            yield piece

    def _piece(self, index: int, text: _Text, token: GeneratedToken) -> Piece:
        path = self._model.path_id(token.path_index)
        text.count(path)
        now_s = self._metrics.clock()
        self._metrics.token(path, text.tokens == 1, now_s - (self._began_s if text.tokens == 1 else text.newest_s))
        text.newest_s = now_s
        ended = token.finish == "stop"  # that token ends the text and stands for none
        shown = "" if ended else text.stream.add(token.token)
        finish = token.finish
        if finish is not None and not text.stream.stopped:
            shown += text.stream.end()
        if text.stream.stopped:
            finish = "stop"
            if token.finish is None and text.ticket is not None:
                text.ticket.cancel()
        text.over = finish is not None
        return Piece(index, shown, path, finish)

    def close(self) -> None:
        """Free the places of what is not written yet."""
        if self._closed:
            return
        self._closed = True
        for text in self._texts:
            if text.ticket is not None and not text.over:
                text.ticket.cancel()
        self._on_close()


def _translated(error: Exception) -> Exception:
    if isinstance(error, Full):
        return Busy(str(error))
    if isinstance(error, EngineBroken):
        return NotReady(BROKEN)
    if status_of(error) is not None:
        return error
    logger.error("a generation failed", exc_info=error)
    return EngineFailed("the generation failed; the log of the server says more")


class Answering:
    """Takes requests until it drains."""

    def __init__(self, engine: TextEngine, model: ServedModel, limits: Limits, metrics: ServerMetrics) -> None:
        self.engine, self.model, self.limits, self.metrics = engine, model, limits, metrics
        self.admission = Admission()

    @property
    def draining(self) -> bool:
        return self.admission.draining

    @property
    def open_answers(self) -> int:
        return self.admission.open

    async def answer(self, asked: Asked) -> Answer:
        """Start a request; raises Draining, Busy, UnknownModel, BadRequest and what the engine does."""
        self.admission.check()
        routing = self.model.routing(asked.model, asked.route)
        texts = len(asked.prompts) * asked.n
        if texts > self.limits.most_texts:
            raise BadRequest(
                f"{texts} texts are asked for (prompts times n), this server writes {self.limits.most_texts}", "n"
            )
        max_tokens = self.limits.new_tokens_of(asked.max_tokens)
        self._check_room(texts)
        answer = Answer(asked, routing, self.model, self.metrics, self.admission.leave)
        self.admission.enter()
        try:
            await self._start(answer, max_tokens)
        except BaseException as error:
            answer.close()
            if isinstance(error, Exception):
                raise _translated(error) from error
            raise
        return answer

    def _check_room(self, texts: int) -> None:
        """Raises Busy, NotReady; before the prompts are tokenized. The engine has the last word."""
        stats = self.engine.stats()
        if stats.broken:
            raise NotReady(BROKEN)
        room = self.limits.running + self.limits.waiting - stats.running - stats.waiting
        if texts > room:
            raise Busy(f"{stats.waiting} texts wait already; try again later")

    @property
    def trouble(self) -> str | None:
        """Why nothing can be answered although the server does not drain; None where it can."""
        return BROKEN if self.engine.stats().broken else None

    async def _start(self, answer: Answer, max_tokens: int) -> None:
        asked, routing = answer.asked, answer.routing
        prompts = await asyncio.to_thread(self._prompts, asked)
        answer.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.metrics.asked(answer.prompt_tokens)
        answer.snapshot = self.model.snapshot
        for index in range(len(prompts) * asked.n):
            sampling = replace(asked.sampling, seed=(asked.sampling.seed + index * _SEED_STRIDE) % 2**64)
            request = Request(
                prompts[index // asked.n],
                max_tokens,
                sampling,
                routing.every,
                routing.path,
                by_router_lm=routing.by_router_lm,
            )
            answer.ask(self.engine, index, request)

    def _prompts(self, asked: Asked) -> list[list[int]]:
        """Token ids of the prompts; raises BadRequest."""
        name = "messages" if asked.chat else "prompt"
        return [self.limits.tokens_of(prompt, self.model.tokenizer, name) for prompt in asked.prompts]
