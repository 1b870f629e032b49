"""What a client of the OpenAI API asks for: bodies of /v1/completions and /v1/chat/completions, checked.

A field whose effect this server does not have is refused unless it asks for none; fields that change no text are let
by. `route` is an extension. The chat template is plain lines, as a base model has no other.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inference.chat_template import TURN_ENDS, conversation, turn
from inference.prompts import prompts_of, text_of
from inference.request_errors import BadRequest
from inference.sampling import Sampling

MAX_STOPS = 16
MAX_VALUES = 20_000  # of a body, without the prompt: what is checked one by one, on the loop of all requests
DEFAULT_COMPLETION_TOKENS = 16  # what the API promises where max_tokens is left out
# What each refused field may hold, as JSON: values that ask for nothing.
_NOTHING: dict[str, tuple[str, ...]] = {
    "logprobs": ("null", "false"),
    "top_logprobs": ("null",),
    "echo": ("null", "false"),
    "best_of": ("null", "1"),
    "suffix": ("null", '""'),
    "presence_penalty": ("null", "0", "0.0"),
    "frequency_penalty": ("null", "0", "0.0"),
    "logit_bias": ("null", "{}"),
    "tools": ("null", "[]"),
    "tool_choice": ("null", '"none"', '"auto"'),
    "functions": ("null", "[]"),
    "function_call": ("null", '"none"', '"auto"'),
    "response_format": ("null", '{"type": "text"}'),
    "modalities": ("null", '["text"]'),
    "audio": ("null",),
    "prediction": ("null",),
    "reasoning_effort": ("null", '"none"'),
    "store": ("null", "false"),
    "web_search_options": ("null",),
}
_IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
_WHY = {
    "logprobs": "this server does not keep the probabilities of tokens",
    "top_logprobs": "this server does not keep the probabilities of tokens",
    "tools": "a base model knows no tools",
    "functions": "a base model knows no functions",
}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool | None = None  # a promise about packet sizes; pieces of text are padded nowhere here


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, strict=True)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    n: Annotated[int, Field(ge=1, strict=True)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    route: str | None = None


class _Completion(_Body):
    prompt: Any  # prompts_of knows what it may be


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None
    name: str | None = None
    refusal: None = None


class _Chat(_Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Texts that are asked for: `n` of every prompt, a prompt being text or token ids. `max_tokens` None: the limit."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    sampling: Sampling
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    route: str | None = None
    chat: bool = False


def completion_asked(data: bytes, most_tokens: int, most_prompts: int) -> Asked:
    """The body of a completion of so many prompts, and token ids of each, at most; raises BadRequest."""
    body = _parsed(data, _Completion)
    prompts = prompts_of(body.prompt, most_tokens, most_prompts)
    return _asked(body, prompts, body.max_tokens or DEFAULT_COMPLETION_TOKENS)


def chat_asked(data: bytes) -> Asked:
    """The body of a chat completion; raises BadRequest."""
    body = _parsed(data, _Chat)
    prompt = text_of(chat_prompt(body.messages), "messages")
    return _asked(body, [prompt], body.max_completion_tokens or body.max_tokens, chat=True)


def chat_prompt(messages: Sequence[Message]) -> str:
    """The text of a conversation, up to the place of the next answer."""
    turns = []
    for message in messages:
        text = message.content if isinstance(message.content, str) else "".join(p.text for p in message.content or [])
        turns.append(turn(message.role, text).rstrip())
    return conversation(turns)


BodyOf = TypeVar("BodyOf", bound=BaseModel)


def _parsed(data: bytes, kind: type[BodyOf]) -> BodyOf:
    return checked(without_nothing(fields_of(data)), kind)


def fields_of(data: bytes) -> dict[str, Any]:
    """The JSON object in a body; raises BadRequest."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body must be one JSON object")
    _check_size(fields)
    return fields


def _check_size(fields: Mapping[str, Any]) -> None:
    """Raises BadRequest where there is more to check than a request has; prompts have a bound of their own."""
    unseen, values = [value for name, value in fields.items() if name != "prompt"], len(fields)
    while unseen:
        value = unseen.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        values += len(inner)
        if values > MAX_VALUES:
            raise BadRequest(f"the body has more than {MAX_VALUES:,} values beside its prompt; leave some out")
        unseen.extend(inner)


def checked(fields: Mapping[str, Any], kind: type[BodyOf]) -> BodyOf:
    """The fields as they should be; raises BadRequest."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"][:1]) or None
        raise BadRequest(_complaint(first, place), place) from None


def _complaint(first: Mapping[str, Any], place: str | None) -> str:
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "extra_forbidden":
        return f"unknown field {'.'.join(map(str, first['loc']))!r}; this server does not know what it asks for"
    given = json.dumps(first["input"], default=str, ensure_ascii=False)
    return f"{place} is {given[:80]}: {first['msg'][0].lower()}{first['msg'][1:]}"


def without_nothing(fields: Mapping[str, Any], allowed: Container[str] = ()) -> dict[str, Any]:
    """The fields without those that ask for nothing; raises BadRequest for those that ask for what is not there.

    `allowed` are kept whatever they ask for.
    """
    kept = {}
    for name, value in fields.items():
        if name in _IGNORED:
            continue
        if name not in _NOTHING or name in allowed:
            kept[name] = value
        elif json.dumps(value) not in _NOTHING[name]:
            why = _WHY.get(name, "this server has nothing of the kind")
            raise BadRequest(f"{name} is not supported: {why}; leave it out", name, "unsupported_parameter")
    return kept


def _asked(body: _Body, prompts: Sequence[Any], max_tokens: int | None, chat: bool = False) -> Asked:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MAX_STOPS or not all(stop):
        raise BadRequest(f"stop takes up to {MAX_STOPS} strings, none of them empty", "stop")
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is for streams; set stream to true or leave it out", "stream_options")
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    temperature = 1.0 if body.temperature is None else body.temperature
    return Asked(
        model=body.model,
        prompts=tuple(prompts),
        max_tokens=max_tokens,
        sampling=Sampling(temperature, body.top_k, body.top_p, seed),
        n=body.n or 1,
        stop=(*stop, *(TURN_ENDS if chat else ())),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        route=body.route,
        chat=chat,
    )
