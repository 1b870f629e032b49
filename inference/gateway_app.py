"""The HTTP door of a gateway: the OpenAI API as one Starlette application (extra `serve`).

Completions pass as the backend writes them; bodies of chats, lists of models and errors are ours. Headers say which
path answered and which was the router's first choice.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inference.api_keys import ApiKeys
from inference.gateway import Forwarding, Gateway
from inference.gateway_backend import BackendFailed, BackendStream
from inference.gateway_chat import ChatAnswer, NoCompletion
from inference.gateway_choice import Failure
from inference.gateway_events import DONE, data_of, object_of
from inference.gateway_requests import Forwarded, chat_forwarded, completion_forwarded
from inference.http_door import GONE, EventStream, HttpDoor, body_of, event, refusal, unless_gone
from inference.openai_answers import model_body
from inference.request_errors import BackendLost, error_body

PATH, FIRST_CHOICE = "x-dipaco-path", "x-dipaco-first-choice"


def make_gateway_app(gateway: Gateway, keys: ApiKeys | None = None) -> Starlette:
    """The application; with `keys`, all of /v1 needs one of them."""
    places = _Places(gateway)
    door = HttpDoor(
        gateway.admission,
        gateway.metrics,
        keys,
        trouble=lambda: None if any(gateway.up().values()) else "no backend is up",
    )
    return door.app(places)


class _Places:
    """The endpoints."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def completions(self, request: Request) -> Response:
        most = self._gateway.most_prompt_tokens
        return await self._answer(request, lambda data: completion_forwarded(data, most))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat_forwarded)

    async def models(self, request: Request) -> Response:
        data = [model_body(self._gateway.model, name) for name in self._gateway.names]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._gateway.check_name(name)
        return JSONResponse(model_body(self._gateway.model, name))

    async def _answer(self, request: Request, parse: Callable[[bytes], Forwarded]) -> Response:
        self._gateway.admission.check()
        asked = parse(await body_of(request))
        self._gateway.admission.enter()
        response: Response | None = None
        try:
            forwarding = await unless_gone(request, self._gateway.forward(asked))
            if forwarding is None:
                return Response(status_code=GONE)
            response = self._response(asked, forwarding)
            return response
        finally:
            if not isinstance(response, EventStream):  # which leaves when it ends
                self._gateway.admission.leave()

    def _response(self, asked: Forwarded, forwarding: Forwarding) -> Response:
        headers = {PATH: forwarding.path, FIRST_CHOICE: forwarding.first_choice}
        chat = None if not asked.chat else _chat_answer(asked, forwarding)
        answer = forwarding.answer
        if isinstance(answer, BackendStream):
            events = self._events(forwarding, answer, chat)
            return EventStream(events, partial(self._close, answer), headers)
        if chat is None or answer.status >= 300:
            return Response(answer.body, answer.status, headers | {"content-type": answer.media_type})
        try:
            return JSONResponse(chat.whole(object_of(answer.body) or {}), headers=headers)
        except NoCompletion as error:
            response = refusal(self._lost(forwarding, Failure("broken", str(error))))
            response.headers.update(headers)
            return response

    async def _events(
        self, forwarding: Forwarding, stream: BackendStream, chat: ChatAnswer | None
    ) -> AsyncIterator[bytes]:
        """The backend's events; where they end too early, an error is the last of them."""
        try:
            async for each in stream.events():
                for passed in [each] if chat is None else _translated(each, chat):
                    yield passed
        except BackendFailed as error:
            yield event(error_body(self._lost(forwarding, error.failure))).encode()
        except NoCompletion as error:
            yield event(error_body(self._lost(forwarding, Failure("broken", str(error))))).encode()

    def _lost(self, forwarding: Forwarding, failure: Failure) -> BackendLost:
        self._gateway.failed(forwarding.path_index, failure)
        return BackendLost(f"path {forwarding.path} {failure.why}; what came before is not the whole text, ask again")

    async def _close(self, stream: BackendStream) -> None:
        try:
            await stream.close()
        finally:
            self._gateway.admission.leave()


def _chat_answer(asked: Forwarded, forwarding: Forwarding) -> ChatAnswer:
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    return ChatAnswer(answer_id, int(time.time()), asked.model, forwarding.path, forwarding.first_choice)


def _translated(each: bytes, chat: ChatAnswer) -> list[bytes]:
    """A completion's event as those of a chat; comments, the end and errors as they are. Raises NoCompletion."""
    data = data_of(each)
    if data is None or data.strip() == DONE:
        return [each]
    chunk = object_of(data)
    if chunk is None:
        raise NoCompletion(f"sent {json.dumps(data[:40].decode(errors='replace'))} in its stream")
    return [each] if "error" in chunk else [event(part).encode() for part in chat.chunks(chunk)]
