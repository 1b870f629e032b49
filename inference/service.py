"""The gRPC door: messages to requests, pieces of text to messages. No decision is taken here.

Exceptions become those of protocol.errors, whose interceptor turns them into statuses.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

from inference.answering import Answer, Answering, Piece
from inference.api_keys import ApiKeys
from inference.openai_answers import model_body
from inference.openai_requests import MAX_STOPS, Asked
from inference.request_errors import BadKey, BadRequest, Busy, Draining, NotReady, UnknownModel, status_of
from inference.sampling import Sampling
from model.topology import UnknownPath
from protocol import inference_pb2 as pb
from protocol import inference_pb2_grpc as pb_grpc
from protocol.errors import NotAllowed, Overloaded, Unavailable, UnservedModel
from protocol.tasks import MalformedMessage

DOOR = "grpc"


class GenerationService(pb_grpc.GenerationServicer):  # type: ignore[misc, unused-ignore]
    """Answers by `answering`; with `keys`, every call needs one of them."""

    def __init__(self, answering: Answering, keys: ApiKeys | None = None) -> None:
        self._answering, self._keys = answering, keys

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        answer: Answer | None = None
        status = "CANCELLED"
        try:
            self._admit(context)
            answer = await self._answering.answer(_asked(request, self._answering.model.name))
            async for piece in answer.pieces():
                if piece.text or piece.finish is not None:
                    yield _reply(answer, piece)
            status = "OK"
        except Exception as error:
            wire = _on_the_wire(error)
            status = type(wire).__name__
            raise wire from error
        finally:
            if answer is not None:
                answer.close()
            self._answering.metrics.answered(DOOR, status)

    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            self._admit(context)
            model = self._answering.model
            told = [model_body(model, name) for name in model.names]
        except Exception as error:
            raise _on_the_wire(error) from error
        return pb.ListModelsReply(
            models=[
                pb.Model(name=each["id"], path=each["dipaco"]["path"] or "", note=each["dipaco"]["note"])
                for each in told
            ]
        )

    def _admit(self, context: Any) -> None:
        """Raises BadKey."""
        if self._keys is not None:
            presented = dict(context.invocation_metadata() or ()).get("authorization", "")
            self._keys.check(presented if isinstance(presented, str) else "")


def _asked(request: Any, name: str) -> Asked:
    """The request; raises BadRequest, BadSampling."""
    if len(request.stop) > MAX_STOPS or not all(request.stop):
        raise BadRequest(f"stop takes up to {MAX_STOPS} strings, none of them empty", "stop")
    sampling = Sampling(
        temperature=request.temperature if request.HasField("temperature") else 1.0,
        top_k=request.top_k or None,
        top_p=request.top_p or None,
        seed=request.seed if request.HasField("seed") else secrets.randbits(63),
    )
    return Asked(
        model=request.model or name,
        prompts=(request.prompt,),
        max_tokens=request.max_tokens or None,
        sampling=sampling,
        stop=tuple(request.stop),
        stream=True,
        route=request.route or None,
    )


def _reply(answer: Answer, piece: Piece) -> Any:
    if piece.finish is None:
        return pb.GenerateReply(text=piece.text, path=piece.path)
    ending = pb.Ending(
        finish_reason=piece.finish,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        paths=[pb.Segment(path=each.path, tokens=each.tokens) for each in answer.segments(piece.index)],
        route=answer.routing.name,
        snapshot=answer.snapshot,
    )
    return pb.GenerateReply(text=piece.text, path=piece.path, ending=ending)


def _on_the_wire(error: Exception) -> Exception:
    """The exception that travels for it; one that is a bug of ours stays as it is."""
    message = str(error)
    match error:
        case BadKey():
            return NotAllowed(message)
        case UnknownModel() | UnknownPath():
            return UnservedModel(message)
        case Draining() | NotReady():
            return Unavailable(message)
        case Busy():
            return Overloaded(message)
    return MalformedMessage(message) if status_of(error) == 400 else error
