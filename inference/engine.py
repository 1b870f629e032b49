"""Generation by one path at a time: the router picks it from the prompt, and looks again where it is asked to.

The grid of looks is that of evaluation: the first after `prefix_tokens` tokens, then every W. Past `sequence_length`
the oldest half is dropped and the rest read again, or generation stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from inference.context import Context
from inference.path_source import PathSource
from inference.sampling import Sampler, Sampling
from routing.router import Router, RouteState

Finish = Literal["stop", "length"]


class PromptTooLong(ValueError):
    """A prompt beyond `sequence_length` where sliding is off."""


class NoRouterLM(ValueError):
    """A request that the router LM should route, where there is none."""


@dataclass(frozen=True, slots=True)
class Request:
    """`prompt` is token ids without BOS. `every`: route again after so many tokens (None: once). `path`: do not route.

    `past_length`: what happens when the sequence is full. `by_router_lm`: the router LM chooses the paths.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    every: int | None = None
    path: int | None = None
    past_length: Literal["slide", "stop"] = "slide"
    by_router_lm: bool = False


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token, the path that wrote it, and on the last one why generation ended (`stop`: the path ended the text)."""

    token: int
    path_index: int
    finish: Finish | None


def window(tokens: Sequence[int], sequence_length: int) -> list[int]:
    """BOS and the newest tokens: half a sequence is dropped as often as it takes to fit."""
    kept = list(tokens)
    while len(kept) > sequence_length:
        kept = kept[:1] + kept[1 + sequence_length // 2 :]
    return kept


def look_after(tokens: int, prefix_tokens: int, every: int | None) -> int:
    """After how many tokens (BOS apart) the route that holds for the next token was, or is, decided."""
    if tokens < prefix_tokens:
        return tokens
    return prefix_tokens if every is None else tokens - (tokens - prefix_tokens) % every


class Engine:
    """Paths of one model, taken from `paths`, chosen by `router`; no state is shared between generations."""

    def __init__(
        self,
        paths: PathSource,
        router: Router,
        prefix_tokens: int,
        bos_id: int,
        eos_id: int,
        router_lm: Router | None = None,
    ) -> None:
        self._paths, self._router, self._router_lm = paths, router, router_lm
        self._prefix_tokens = prefix_tokens
        self._bos_id, self._eos_id = bos_id, eos_id

    def generate(self, request: Request) -> Iterator[GeneratedToken]:
        """The tokens that follow the prompt; raises PromptTooLong, NoRouterLM, UnknownPath and what the source does."""
        sequence_length = self._paths.config.sequence_length
        stream = [self._bos_id, *request.prompt]
        if len(stream) > sequence_length and request.past_length == "stop":
            raise PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens, the model takes {sequence_length - 1}; "
                "shorten it or let it slide"
            )
        route = Route(self._router_of(request), self._prefix_tokens, request)
        sampler = Sampler(request.sampling)
        context = self._paths.context()
        path_index = route.of(stream)
        context.use(*self._paths.modules(path_index))
        context.read(window(stream, sequence_length))
        for count in range(1, request.max_tokens + 1):
            if (look := route.of(stream)) != path_index:
                path_index = look
                context.use(*self._paths.modules(path_index))
            token = sampler.choose(context.logits())
            stream.append(token)
            full = context.length == sequence_length
            finish = self._finish(token, count == request.max_tokens or (full and request.past_length == "stop"))
            yield GeneratedToken(token, path_index, finish)
            if finish is not None:
                return
            self._append(context, stream, token)

    def _router_of(self, request: Request) -> Router:
        if not request.by_router_lm:
            return self._router
        if self._router_lm is None:
            raise NoRouterLM("this model has no router LM; route by sequence, every:W or path:I.J")
        return self._router_lm

    def _finish(self, token: int, exhausted: bool) -> Finish | None:
        if token == self._eos_id:
            return "stop"
        return "length" if exhausted else None

    def _append(self, context: Context, stream: list[int], token: int) -> None:
        sequence_length = self._paths.config.sequence_length
        if context.length < sequence_length:
            context.read([token])
        else:
            context.restart(window([*context.tokens, token], sequence_length))


class Route:
    """The route of one generation: asks the router only where the grid says so."""

    def __init__(self, router: Router, prefix_tokens: int, request: Request) -> None:
        self._router, self._prefix_tokens, self._request = router, prefix_tokens, request
        self._state: RouteState | None = None
        self._looked_after: int | None = None
        self._path_index = 0 if request.path is None else request.path

    def of(self, stream: Sequence[int]) -> int:
        """The path for the token that follows `stream` (BOS first)."""
        tokens = len(stream) - 1
        look = look_after(tokens, self._prefix_tokens, self._request.every)
        if self._request.path is not None or look == self._looked_after:
            return self._path_index
        if tokens < self._prefix_tokens and self._looked_after is not None:
            return self._path_index  # a short prompt is routed as it is, and again when the prefix is whole
        if self._looked_after is None and look > self._prefix_tokens:
            self._ask(stream, self._prefix_tokens)
        self._ask(stream, look)
        self._looked_after = look
        return self._path_index

    def _ask(self, stream: Sequence[int], look: int) -> None:
        posterior, self._state = self._router.route(np.asarray(stream[: look + 1], np.int64), self._state)
        self._path_index = int(np.argmax(posterior))
