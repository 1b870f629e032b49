"""What every call passes on its way into a server: the check of token and certificate, and exceptions into statuses.

The order is ErrorInterceptor outside, AdmissionInterceptor inside, so that a refusal travels like any other.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from protocol.channel import RENEWED_TOKEN_KEY
from protocol.errors import NAME_KEY, NotAllowed, Refusal, one_line, refusal_of
from protocol.peer import peer_of
from protocol.security import Gate
from protocol.tasks import MalformedMessage

logger = logging.getLogger(__name__)

Continuation = Callable[[Any], Awaitable[Any]]
_SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
_HEALTH = "/grpc.health.v1.Health/"


def _shape(handler: Any) -> str:
    """Which of the four behaviours a method handler has."""
    return next(shape for shape in _SHAPES if getattr(handler, shape) is not None)


def _with_behaviour(handler: Any, behaviour: Any) -> Any:
    """The same method with another behaviour."""
    make = getattr(grpc, f"{_shape(handler)}_rpc_method_handler")
    return make(behaviour, _tolerant(handler.request_deserializer), handler.response_serializer)


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Bytes that are no message become the refusal that they deserve; gRPC itself would answer INTERNAL."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, UnicodeDecodeError) as error:
            return MalformedMessage(f"not a message of this call: {error}")

    return parse


def _parsed(request: Any) -> Any:
    """The request, or each message of its stream; raises MalformedMessage."""
    if isinstance(request, MalformedMessage):
        raise request
    return _parsed_stream(request) if hasattr(request, "__aiter__") else request


async def _parsed_stream(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for message in messages:
        yield _parsed(message)


async def _abort(context: Any, error: Exception) -> NoReturn:
    refusal = refusal_of(error)
    if refusal is None:
        logger.error("a call failed unexpectedly", exc_info=error)
        refusal = Refusal(
            "INTERNAL", "RemoteFailure", one_line(f"the coordinator failed: {type(error).__name__}: {error}")
        )
    await context.abort(getattr(grpc.StatusCode, refusal.status), refusal.message, ((NAME_KEY, refusal.name),))
    raise AssertionError("abort returns never")


def _translating(behaviour: Any, streams: bool) -> Any:
    """The behaviour with its exceptions turned into statuses."""

    async def answer(request: Any, context: Any) -> Any:
        try:
            return await behaviour(_parsed(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    async def answer_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in behaviour(_parsed(request), context):
                yield message
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return answer_stream if streams else answer


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    """Applies the table of protocol.errors to every call of dipaco's services."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/dipaco."):
            return handler
        shape = _shape(handler)
        return _with_behaviour(handler, _translating(getattr(handler, shape), shape.endswith("stream")))


class AdmissionInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    """Lets in only calls that the gate admits, each anew, on old connections too; the health service answers anyone.

    A caller whose token is about to end is told the new one in the trailing metadata of the answer.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH):
            return handler
        presented = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        shape = _shape(handler)
        behaviour = self._guarding(getattr(handler, shape), presented, shape.endswith("stream"))
        make = getattr(grpc, f"{shape}_rpc_method_handler")
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    def _guarding(self, behaviour: Any, presented: str | bytes, streams: bool) -> Any:
        """The behaviour behind the check."""

        async def answer(request: Any, context: Any) -> Any:
            await self._admit(presented, context)
            return await behaviour(request, context)

        async def answer_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await self._admit(presented, context)
            async for message in behaviour(request, context):
                yield message

        return answer_stream if streams else answer

    async def _admit(self, presented: str | bytes, context: Any) -> None:
        try:
            renewed = self._gate.check(presented, peer_of(context))
        except NotAllowed as error:
            await _abort(context, error)
        if renewed:
            context.set_trailing_metadata(((RENEWED_TOKEN_KEY, renewed),))
