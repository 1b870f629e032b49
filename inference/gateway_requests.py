"""What a client asks a gateway for: the text that is routed, and the body that goes on to a backend. Pure.

A completion goes on as it is, whatever its backend may know of it, but for the model's name and `route`. A chat is
written out by the plain template of our own server and goes on as a completion, as base models have no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from inference.chat_template import TURN_ENDS
from inference.openai_requests import Message, chat_prompt, checked, fields_of, without_nothing
from inference.prompts import prompts_of, text_of
from inference.request_errors import BadRequest

PLAIN_ROUTES = "sequence or path:I.J"
# Of a chat, too, as completions have them.
_SAMPLING = ("presence_penalty", "frequency_penalty", "logit_bias")


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    route: str | None = None


class _Completion(_Body):
    prompt: Any  # prompts_of knows what it may be


class _Chat(_Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    stop: str | list[str] | None = None


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One prompt, and the fields that go on with it. `max_tokens` None: the backend's default, in a chat the rest."""

    model: str
    prompt: str | tuple[int, ...]
    fields: Mapping[str, Any]
    max_tokens: int | None
    stream: bool = False
    route: str | None = None
    chat: bool = False

    def body(self, model: str, max_tokens: int | None) -> bytes:
        """The body of a completion for a backend that knows the path as `model`."""
        bound = {} if max_tokens is None else {"max_tokens": max_tokens}
        return json.dumps({**self.fields, "model": model, **bound}, ensure_ascii=False).encode()


def completion_forwarded(data: bytes, most_tokens: int) -> Forwarded:
    """The body of a completion, of so many token ids at most; raises BadRequest."""
    fields = fields_of(data)
    body = checked(fields, _Completion)
    prompt = _one_prompt(body.prompt, most_tokens)
    return Forwarded(body.model, prompt, _going_on(fields), body.max_tokens, bool(body.stream), body.route)


def chat_forwarded(data: bytes) -> Forwarded:
    """The body of a chat completion; raises BadRequest."""
    fields = without_nothing(fields_of(data), _SAMPLING)
    body = checked(fields, _Chat)
    prompt = text_of(chat_prompt(body.messages), "messages")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    going_on = _going_on(fields) | {"prompt": prompt, "stop": [*stop, *TURN_ENDS]}
    max_tokens = body.max_completion_tokens or body.max_tokens
    return Forwarded(body.model, prompt, going_on, max_tokens, bool(body.stream), body.route, chat=True)


def _going_on(fields: Mapping[str, Any]) -> dict[str, Any]:
    ours = ("model", "route", "messages", "max_completion_tokens")
    return {name: value for name, value in fields.items() if name not in ours}


def _one_prompt(prompt: Any, most_tokens: int) -> str | tuple[int, ...]:
    """The prompt, alone in a list or not; raises BadRequest for several, which may belong to several paths."""
    if isinstance(prompt, list) and len(prompt) != 1 and not (prompt and type(prompt[0]) is int):
        raise BadRequest(
            f"prompt is a list of {len(prompt)} prompts; the gateway sends one to its path: ask for each by itself",
            "prompt",
        )
    (only,) = prompts_of(prompt, most_tokens, 1)
    return only
