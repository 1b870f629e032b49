"""What every HTTP door of ours has: keys, errors in the API's shape, bounded bodies, health, clients that leave.

Which places lie behind it is the application's (extra `serve`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from inference.admission import Admission
from inference.api_keys import ApiKeys
from inference.metrics import DoorMetrics
from inference.request_errors import BadRequest, BodyTooLarge, error_body, retry_after_s, status_of

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 1024**2
DOOR = "http"
GONE = 499  # the client left: a status for the metrics that nobody receives

Endpoint = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")


class Places(Protocol):
    """The endpoints of the OpenAI API that lie behind a door."""

    async def completions(self, request: Request) -> Response: ...

    async def chat(self, request: Request) -> Response: ...

    async def models(self, request: Request) -> Response: ...

    async def model(self, request: Request) -> Response: ...


class HttpDoor:
    """Guards places and tells how the server is; `trouble` names why it cannot take requests although it would."""

    def __init__(
        self,
        admission: Admission,
        metrics: DoorMetrics,
        keys: ApiKeys | None,
        trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._admission, self._metrics, self._keys, self._trouble = admission, metrics, keys, trouble

    def app(self, places: Places) -> Starlette:
        """The application: the places of the API, guarded, and those that need no key."""
        guarded = [
            ("POST", "/v1/completions", places.completions),
            ("POST", "/v1/chat/completions", places.chat),
            ("GET", "/v1/models", places.models),
            ("GET", "/v1/models/{name:path}", places.model),
        ]
        routes = [Route(path, self.guarded(endpoint), methods=[method]) for method, path, endpoint in guarded]
        routes += [
            Route("/healthz", self.health, methods=["GET"]),
            Route("/readyz", self.readiness, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _not_here})

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint behind the check of keys, its exceptions turned into answers."""

        async def answer(request: Request) -> Response:
            try:
                if self._keys is not None:
                    self._keys.check(request.headers.get("authorization", ""))
                response = await endpoint(request)
            except Exception as error:
                response = refusal(error)
            self._metrics.answered(DOOR, str(response.status_code))
            return response

        return answer

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return PlainTextResponse("ok\n")

    async def readiness(self, request: Request) -> Response:
        """It takes requests."""
        trouble = "draining" if self._admission.draining else self._trouble()
        return PlainTextResponse("ready\n") if trouble is None else PlainTextResponse(f"{trouble}\n", 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _not_here(request: Request, error: Exception) -> Response:
    """A place or a method that is not there, in the shape of all errors."""
    assert isinstance(error, HTTPException)
    body = error_body(BadRequest(f"{request.method} {request.url.path}: {error.detail}", code="unknown_url"))
    return JSONResponse(body, error.status_code, headers=error.headers)


class EventStream(StreamingResponse):
    """Server-sent events. `close` is awaited however the stream ends, also where it never began."""

    def __init__(
        self,
        events: AsyncIterator[str | bytes],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        told = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(events, media_type="text/event-stream", headers=told)
        self._close = close

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns; None where the client hung up first, and the work was cancelled."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(body: object) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def body_of(request: Request) -> bytes:
    """The body, refused before it is held where it is too long; raises BodyTooLarge."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES:,} bytes, the most that a request may have")
    return b"".join(parts)


def refusal(error: Exception) -> Response:
    """The answer to a request that ended with `error`; one that is a bug of ours is logged."""
    status = status_of(error)
    if status is None:
        logger.error("a request failed unexpectedly", exc_info=error)
    seconds = retry_after_s(error)
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status or 500, headers=headers)
