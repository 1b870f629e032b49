"""A backend of a gateway: one path behind an OpenAI API, over HTTP (extra `serve`).

The proxies that an environment names are not asked and redirects not followed: a key goes to the host of its URL alone.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx2

from inference.gateway_choice import Failure, probe_verdict, verdict
from inference.gateway_config import BadBackend, Patience, Target
from inference.gateway_events import DONE, BadEvents, EventSplitter, data_of, object_of

MAX_ANSWER_BYTES = 32 * 1024**2
_KEEP_ALIVE_S = 2.0  # shorter than servers keep a connection, so that none is used while it is being closed
_PROBE_S = 5.0
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE_S)


class BackendFailed(RuntimeError):
    """A backend did not answer, or not to the end."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.why)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Answered:
    """A whole answer."""

    status: int
    media_type: str
    body: bytes


@cache
def _machine_trust() -> ssl.SSLContext:
    """What this machine trusts, read once: it takes long, and there may be hundreds of backends."""
    return httpx2.create_ssl_context(trust_env=False)


class Backend:
    """Calls one target, whose URL may be one that cannot be called (BadBackend). `close` it at the end."""

    def __init__(self, target: Target, patience: Patience) -> None:
        self.target, self._patience = target, patience
        try:
            httpx2.URL(target.url)
        except httpx2.InvalidURL as error:
            raise BadBackend(f"the backend of path {target.path}: url {target.url!r} is none: {error}") from None
        headers = {"User-Agent": "dipaco-gateway", "Accept-Encoding": "identity"}
        if target.key is not None:
            headers["Authorization"] = f"Bearer {target.key}"
        timeout = httpx2.Timeout(patience.silence_s, connect=patience.connect_s, pool=None)
        self._client = httpx2.AsyncClient(
            verify=target.tls or _machine_trust(),
            headers=headers,
            timeout=timeout,
            limits=_LIMITS,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def whole(self, body: bytes) -> Answered:
        """The answer to a completion that is not streamed; raises BackendFailed."""
        try:
            async with asyncio.timeout(self._patience.silence_s):
                response = await self._send(body)
                try:
                    return await _read(response)
                finally:
                    await response.aclose()
        except (httpx2.HTTPError, TimeoutError) as error:
            raise _failed(error) from None

    async def stream(self, body: bytes) -> Answered | BackendStream:
        """An open stream whose first event is there, or the whole answer that refuses one; raises BackendFailed."""
        response = None
        try:
            async with asyncio.timeout(self._patience.first_byte_s):
                response = await self._send(body)
                if response.status_code >= 300:
                    answered = await _read(response)
                    await response.aclose()
                    return answered
                opened = BackendStream(response)
                await opened.begin()
                return opened
        except BaseException as error:
            if response is not None:
                await response.aclose()
            if isinstance(error, (httpx2.HTTPError, TimeoutError)):
                raise _failed(error) from None
            raise

    async def probe(self) -> tuple[Failure | None, tuple[str, ...]]:
        """What is wrong with it, and the names of its models where it lists them."""
        try:
            async with asyncio.timeout(min(_PROBE_S, self._patience.connect_s + self._patience.first_byte_s)):
                response = await self._client.send(
                    self._client.build_request("GET", f"{self.target.url}/models"), stream=True
                )
                try:
                    answered = await _read(response)
                finally:
                    await response.aclose()
        except (httpx2.HTTPError, TimeoutError) as error:
            return _failed(error).failure, ()
        except BackendFailed as error:
            return error.failure, ()
        return probe_verdict(answered.status), _names(answered)

    async def _send(self, body: bytes) -> httpx2.Response:
        """The opened response; raises BackendFailed for a status that is a failure."""
        request = self._client.build_request(
            "POST", f"{self.target.url}/completions", content=body, headers={"Content-Type": "application/json"}
        )
        response = await self._client.send(request, stream=True)
        failure = verdict(response.status_code, response.headers.get("retry-after"))
        if failure is not None:
            await response.aclose()
            raise BackendFailed(failure)
        return response


class BackendStream:
    """Events as they come. The stream is over after [DONE] or an error of the backend's own."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._parts = response.aiter_bytes()
        self._splitter = EventSplitter()
        self._ready: list[bytes] = []

    async def begin(self) -> None:
        """Wait for the first event with data; raises BackendFailed."""
        media_type = self._response.headers.get("content-type", "")
        if not media_type.startswith("text/event-stream"):
            raise BackendFailed(Failure("broken", f"answered {media_type or 'no media type'} instead of a stream"))
        while not any(data_of(event) is not None for event in self._ready):
            self._ready += await self._more()

    async def events(self) -> AsyncIterator[bytes]:
        """All whole events; raises BackendFailed where they end before the stream is over."""
        while True:
            for event in self._ready:
                yield event
                if _last(event):
                    return
            try:
                self._ready = await self._more()
            except (httpx2.HTTPError, TimeoutError) as error:
                raise _failed(error) from None

    async def close(self) -> None:
        """Hang up: a backend stops to write for nobody."""
        await self._response.aclose()

    async def _more(self) -> list[bytes]:
        try:
            return self._splitter.feed(await anext(self._parts))
        except StopAsyncIteration:
            if found := self._splitter.end():
                return found
            raise BackendFailed(Failure("broken", "ended its stream too early")) from None
        except BadEvents as error:
            raise BackendFailed(Failure("broken", str(error))) from None


def _last(event: bytes) -> bool:
    data = data_of(event)
    return data is not None and (data.strip() == DONE or "error" in (object_of(data) or {}))


async def _read(response: httpx2.Response) -> Answered:
    """All of it; raises BackendFailed where it is too long."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise BackendFailed(Failure("broken", f"answered more than {MAX_ANSWER_BYTES:,} bytes"))
    media_type = response.headers.get("content-type", "application/json")
    return Answered(response.status_code, media_type, b"".join(parts))


def _names(answered: Answered) -> tuple[str, ...]:
    listed: Any = (object_of(answered.body) or {}).get("data")
    if not isinstance(listed, list):
        return ()
    return tuple(str(each["id"]) for each in listed if isinstance(each, dict) and "id" in each)


def _failed(error: Exception) -> BackendFailed:
    """What happened, in words that name no address."""
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        return BackendFailed(Failure("unreachable", "cannot be reached"))
    if isinstance(error, (httpx2.TimeoutException, TimeoutError)):
        return BackendFailed(Failure("silent", "did not answer in time"))
    return BackendFailed(Failure("broken", "broke the connection"))
