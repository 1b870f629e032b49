"""The HTTP door of a run: the OpenAI API as one Starlette application (extra `serve`)."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inference.answering import Answer, Answering
from inference.api_keys import ApiKeys
from inference.http_door import GONE, EventStream, HttpDoor, body_of, event, unless_gone
from inference.openai_answers import (
    answer_body,
    first_chunks,
    model_body,
    models_body,
    piece_chunk,
    usage_chunk,
)
from inference.openai_requests import Asked, chat_asked, completion_asked
from inference.request_errors import error_body, status_of

logger = logging.getLogger(__name__)


def make_app(answering: Answering, keys: ApiKeys | None = None) -> Starlette:
    """The application; with `keys`, all of /v1 needs one of them."""
    places = _Places(answering)
    door = HttpDoor(answering.admission, answering.metrics, keys, lambda: answering.trouble)
    return door.app(places)


class _Places:
    """The endpoints."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def completions(self, request: Request) -> Response:
        limits = self._answering.limits
        most = limits.prompt_tokens, limits.most_texts
        return await self._answer(request, lambda data: completion_asked(data, *most), "cmpl")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat_asked, "chatcmpl")

    async def models(self, request: Request) -> Response:
        return JSONResponse(models_body(self._answering.model))

    async def model(self, request: Request) -> Response:
        return JSONResponse(model_body(self._answering.model, request.path_params["name"]))

    async def _answer(self, request: Request, parse: Callable[[bytes], Asked], prefix: str) -> Response:
        answer = await self._answering.answer(parse(await body_of(request)))
        answer_id, now_s = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        if answer.asked.stream:

            async def close() -> None:
                answer.close()

            return EventStream(_events(answer, answer_id, now_s), close)
        try:
            found = await unless_gone(request, _collect(answer))
            if found is None:
                return Response(status_code=GONE)
            return JSONResponse(answer_body(answer, *found, answer_id, now_s))
        finally:
            answer.close()


async def _collect(answer: Answer) -> tuple[list[str], list[str]]:
    """All texts, and why each ended."""
    texts: dict[int, list[str]] = {}
    finishes: dict[int, str] = {}
    async for piece in answer.pieces():
        texts.setdefault(piece.index, []).append(piece.text)
        if piece.finish is not None:
            finishes[piece.index] = piece.finish
    return ["".join(texts[index]) for index in sorted(texts)], [finishes[index] for index in sorted(finishes)]


async def _events(answer: Answer, answer_id: str, now_s: int) -> AsyncIterator[str]:
    """Server-sent events; an error in the middle is the last of them."""
    try:
        for chunk in first_chunks(answer, answer_id, now_s):
            yield event(chunk)
        async for piece in answer.pieces():
            if piece.text or piece.finish is not None:
                yield event(piece_chunk(answer, piece, answer_id, now_s))
        if answer.asked.include_usage:
            yield event(usage_chunk(answer, answer_id, now_s))
        yield "data: [DONE]\n\n"
    except Exception as error:
        if status_of(error) is None:
            logger.error("a stream failed", exc_info=error)
        yield event(error_body(error))
