"""One text as it is read and written: what is to be run next, which path writes, when it ends. No tensor in it.

The same decisions, in the same order, as `Engine.generate` makes for a text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from configs.schema import ModelConfig
from inference.context import first_block_of
from inference.engine import Finish, GeneratedToken, NoRouterLM, PromptTooLong, Request, Route, window
from inference.path_source import PathSource
from inference.sampling import Sampler
from routing.router import Router


class BadScores(ValueError):
    """A path whose scores are not finite."""


class UnknownToken(ValueError):
    """A token id that the vocabulary does not have, or a request for no token."""


@dataclass(frozen=True, slots=True)
class Served:
    """One snapshot of the paths and what routes to them; a text keeps that which it began with."""

    paths: PathSource
    router: Router
    router_lm: Router | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How texts of a model begin and end, and how many tokens the router sees of one at first."""

    prefix_tokens: int
    bos_id: int
    eos_id: int


@dataclass(frozen=True, slots=True)
class Pending:
    """Tokens from `begin` on are to be run through the blocks from `first` on; `again`: because the path changed."""

    first: int
    begin: int
    again: bool = False


class Stream:
    """One request under way."""

    def __init__(self, request: Request, served: Served, reading: Reading) -> None:
        """Raises PromptTooLong, UnknownPath, NoRouterLM and UnknownToken."""
        config = served.paths.config
        check_request(request, served, config)
        router = served.router
        if request.by_router_lm:
            assert served.router_lm is not None
            router = served.router_lm
        self.request, self.served = request, served
        self.text = [reading.bos_id, *request.prompt]
        self.context = window(self.text, config.sequence_length)
        self.pending: Pending | None = Pending(0, 0)
        self.path_index: int | None = None
        self.digests: tuple[str, ...] = ()
        self.slot = -1
        self.written = 0
        self._config, self._eos_id = config, reading.eos_id
        self._route = Route(router, reading.prefix_tokens, request)
        self._sampler = Sampler(request.sampling)

    def route(self) -> bool:
        """Ask for the path of the next token; True where it changed what was read under another."""
        path_index = self._route.of(self.text)
        if path_index == self.path_index:
            return False
        former, self.path_index = self.digests, path_index
        self.digests = self.served.paths.digests(path_index)
        if not former:
            return False
        levels = self.served.paths.topology.levels
        changed = [
            first_block_of(level, self._config.blocks)
            for level, old, new in zip(levels, former, self.digests, strict=True)
            if old != new
        ]
        if not changed:
            return False
        self.pending = Pending(min(changed), 0, again=True)
        return True

    def ran(self, end: int) -> None:
        """The pending tokens before `end` were run."""
        assert self.pending is not None
        whole = end == len(self.context) or self.pending.first == self._config.blocks
        self.pending = None if whole else Pending(self.pending.first, end, self.pending.again)

    def take(self, scores: Float[np.ndarray, " V"]) -> GeneratedToken:
        """Choose the next token by the scores after all of the context, and append it. Raises BadScores."""
        assert self.path_index is not None
        if not np.isfinite(scores).all():
            path_id = self.served.paths.topology.path_id(self.path_index)
            raise BadScores(f"path {path_id} scores the next token with numbers that are not finite; it has diverged")
        token = self._sampler.choose(scores)
        self.text.append(token)
        self.written += 1
        finish = self._finish(token)
        if finish is None:
            self._append(token)
        return GeneratedToken(token, self.path_index, finish)

    def _finish(self, token: int) -> Finish | None:
        if token == self._eos_id:
            return "stop"
        full = len(self.context) == self._config.sequence_length and self.request.past_length == "stop"
        return "length" if full or self.written == self.request.max_tokens else None

    def _append(self, token: int) -> None:
        """The next token to be read; where there is no room, the oldest half goes and the rest is read again."""
        if len(self.context) < self._config.sequence_length:
            self.context.append(token)
        else:
            self.context = window([*self.context, token], self._config.sequence_length)
            self.pending = Pending(0, 0)


def check_request(request: Request, served: Served, config: ModelConfig) -> None:
    """Raises PromptTooLong, UnknownPath, NoRouterLM and UnknownToken."""
    if len(request.prompt) >= config.sequence_length and request.past_length == "stop":
        raise PromptTooLong(
            f"the prompt has {len(request.prompt)} tokens, the model takes {config.sequence_length - 1}; "
            "shorten it or let it slide"
        )
    if request.path is not None:
        served.paths.digests(request.path)
    if request.by_router_lm and served.router_lm is None:
        raise NoRouterLM("this model has no router LM; route by sequence, every:W or path:I.J")
    if request.max_tokens < 1:
        raise UnknownToken(f"max_tokens is {request.max_tokens}, expected at least 1")
    _check_tokens(request.prompt, served.paths.vocab_size)


def _check_tokens(prompt: Sequence[int], vocab_size: int) -> None:
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise UnknownToken(f"the prompt has token {token}, the vocabulary ends at {vocab_size - 1}")
