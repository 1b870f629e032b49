"""The HTTP door: the OpenAI API, health, readiness and metrics as one Starlette application (extra `serve`)."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from inference.answering import Answer, Answering
from inference.api_keys import ApiKeys
from inference.openai_answers import (
    answer_body,
    first_chunks,
    model_body,
    models_body,
    piece_chunk,
    usage_chunk,
)
from inference.openai_requests import Asked, chat_asked, completion_asked
from inference.request_errors import BadRequest, BodyTooLarge, error_body, retry_after_s, status_of

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 1024**2
DOOR = "http"
_GONE = 499  # the client left: a status for the metrics that nobody receives

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(answering: Answering, keys: ApiKeys | None = None) -> Starlette:
    """The application; with `keys`, all of /v1 needs one of them."""
    door = _Door(answering, keys)
    routes = [
        Route("/v1/completions", door.guarded(door.completions), methods=["POST"]),
        Route("/v1/chat/completions", door.guarded(door.chat), methods=["POST"]),
        Route("/v1/models", door.guarded(door.models), methods=["GET"]),
        Route("/v1/models/{name:path}", door.guarded(door.model), methods=["GET"]),
        Route("/healthz", door.health, methods=["GET"]),
        Route("/readyz", door.readiness, methods=["GET"]),
        Route("/metrics", door.metrics, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _not_here})


async def _not_here(request: Request, error: Exception) -> Response:
    """A place or a method that is not there, in the shape of all errors."""
    assert isinstance(error, HTTPException)
    body = error_body(BadRequest(f"{request.method} {request.url.path}: {error.detail}", code="unknown_url"))
    return JSONResponse(body, error.status_code, headers=error.headers)


class _Door:
    """The endpoints."""

    def __init__(self, answering: Answering, keys: ApiKeys | None) -> None:
        self._answering, self._keys = answering, keys

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint behind the check of keys, its exceptions turned into answers."""

        async def answer(request: Request) -> Response:
            try:
                if self._keys is not None:
                    self._keys.check(request.headers.get("authorization", ""))
                response = await endpoint(request)
            except Exception as error:
                response = _refusal(error)
            self._answering.metrics.answered(DOOR, str(response.status_code))
            return response

        return answer

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, completion_asked, "cmpl")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat_asked, "chatcmpl")

    async def models(self, request: Request) -> Response:
        return JSONResponse(models_body(self._answering.model))

    async def model(self, request: Request) -> Response:
        return JSONResponse(model_body(self._answering.model, request.path_params["name"]))

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return PlainTextResponse("ok\n")

    async def readiness(self, request: Request) -> Response:
        """It takes requests."""
        if self._answering.draining:
            return PlainTextResponse("draining\n", 503)
        return PlainTextResponse("ready\n")

    async def metrics(self, request: Request) -> Response:
        page = self._answering.metrics.page()
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _answer(self, request: Request, parse: Callable[[bytes], Asked], prefix: str) -> Response:
        answer = await self._answering.answer(parse(await _body(request)))
        answer_id, now_s = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        if answer.asked.stream:
            events = _events(answer, answer_id, now_s)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return _Stream(events, answer, media_type="text/event-stream", headers=headers)
        try:
            return await _whole(request, answer, answer_id, now_s)
        finally:
            answer.close()


class _Stream(StreamingResponse):
    """A stream that closes its answer however it ends, also where it never began."""

    def __init__(self, events: AsyncIterator[str], answer: Answer, media_type: str, headers: dict[str, str]) -> None:
        super().__init__(events, media_type=media_type, headers=headers)
        self._answer = answer

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _whole(request: Request, answer: Answer, answer_id: str, now_s: int) -> Response:
    """The answer in one, given up when the client leaves."""
    writing = asyncio.create_task(_collect(answer))
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            return Response(status_code=_GONE)
        texts, finishes = writing.result()
    finally:
        for task in (writing, leaving):
            task.cancel()
        await asyncio.gather(writing, leaving, return_exceptions=True)
    return JSONResponse(answer_body(answer, texts, finishes, answer_id, now_s))


async def _collect(answer: Answer) -> tuple[list[str], list[str]]:
    """All texts, and why each ended."""
    texts: dict[int, list[str]] = {}
    finishes: dict[int, str] = {}
    async for piece in answer.pieces():
        texts.setdefault(piece.index, []).append(piece.text)
        if piece.finish is not None:
            finishes[piece.index] = piece.finish
    return ["".join(texts[index]) for index in sorted(texts)], [finishes[index] for index in sorted(finishes)]


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(answer: Answer, answer_id: str, now_s: int) -> AsyncIterator[str]:
    """Server-sent events; an error in the middle is the last of them."""
    try:
        for chunk in first_chunks(answer, answer_id, now_s):
            yield _event(chunk)
        async for piece in answer.pieces():
            if piece.text or piece.finish is not None:
                yield _event(piece_chunk(answer, piece, answer_id, now_s))
        if answer.asked.include_usage:
            yield _event(usage_chunk(answer, answer_id, now_s))
        yield "data: [DONE]\n\n"
    except Exception as error:
        if status_of(error) is None:
            logger.error("a stream failed", exc_info=error)
        yield _event(error_body(error))


def _event(body: object) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _body(request: Request) -> bytes:
    """The body, refused before it is held where it is too long; raises BodyTooLarge."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES:,} bytes, the most that a request may have")
    return b"".join(parts)


def _refusal(error: Exception) -> Response:
    status = status_of(error)
    if status is None:
        logger.error("a request failed unexpectedly", exc_info=error)
    seconds = retry_after_s(error)
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status or 500, headers=headers)
