"""A gateway: scores a prompt with the router, asks the path's backend, and the next best path's where that one fails.

Until the first byte of an answer nothing was sent on, so that another path can be asked; after it a failure is told.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from inference.admission import Admission
from inference.gateway_backend import Answered, Backend, BackendFailed, BackendStream
from inference.gateway_choice import Choice, Failure, NoBackend
from inference.gateway_metrics import GatewayMetrics
from inference.gateway_requests import PLAIN_ROUTES, Forwarded
from inference.request_errors import BadRequest, Busy, NoPathAnswers, UnknownModel
from inference.served_model import Limits, ServedModel
from model.topology import UnknownPath
from routing.artefact import RouterArtefact


@dataclass(frozen=True, slots=True)
class PathIds:
    """The paths that a router's posterior is over."""

    ids: tuple[str, ...]

    @property
    def num_paths(self) -> int:
        return len(self.ids)

    def path_id(self, path_index: int) -> str:
        return self.ids[path_index]

    def path_index(self, path_id: str) -> int:
        """Raises UnknownPath."""
        if path_id not in self.ids:
            raise UnknownPath(f"there is no path {path_id!r}; paths run from {self.ids[0]} to {self.ids[-1]}")
        return self.ids.index(path_id)


@dataclass(frozen=True, slots=True)
class Forwarding:
    """An answer that has begun: the path that gives it, and the router's first choice."""

    path: str
    first_choice: str
    path_index: int
    answer: Answered | BackendStream


@dataclass(frozen=True, slots=True)
class Wanted:
    """The paths to ask, best first, and the one that the router (or the client) would have."""

    first_choice: int
    order: tuple[int, ...]
    prompt_tokens: int


class Gateway:
    """For one event loop. `say` hears when a backend comes or goes."""

    def __init__(
        self,
        artefact: RouterArtefact,
        model: ServedModel,
        backends: Sequence[Backend | None],
        choice: Choice,
        limits: Limits,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.metrics, self.admission = model, GatewayMetrics(), Admission(limits.running)
        self._artefact, self._router = artefact, artefact.router
        self._backends, self._choice, self._limits, self._say = tuple(backends), choice, limits, say
        self._scoring = asyncio.Lock()
        self._told_up = {backend.target.path: True for backend in self._backends if backend is not None}
        self._told_names: set[str] = set()
        self.metrics.follow(self.up, lambda: self.admission.open)

    @property
    def names(self) -> list[str]:
        """The mixture, and its paths that have a backend."""
        served = [f"{self.model.name}/{path}" for path in self._told_up]
        return [name for name in self.model.names if name == self.model.name or name in served]

    def check_name(self, name: str) -> None:
        """Raises UnknownModel."""
        self.model.check_name(name)
        if name not in self.names:
            raise UnknownModel(f"{name!r} has no backend here; this gateway has {', '.join(self.names)}", "model")

    def up(self) -> dict[str, bool]:
        """Which backends are asked, by path."""
        now_s = self.metrics.clock()
        return {
            backend.target.path: self._choice.up(index, now_s)
            for index, backend in enumerate(self._backends)
            if backend is not None
        }

    @property
    def most_prompt_tokens(self) -> int:
        """Of one request."""
        return self._limits.prompt_tokens

    async def forward(self, asked: Forwarded) -> Forwarding:
        """The beginning of the answer of the best path that gives one.

        Raises UnknownModel, BadRequest, Busy, NoPathAnswers.
        """
        wanted = await self._wanted(asked)
        failures: list[tuple[str, Failure]] = []
        for path_index in wanted.order:
            backend = self._backends[path_index]
            assert backend is not None
            try:
                return await self._asked(backend, path_index, wanted, asked)
            except BackendFailed as error:
                self.failed(path_index, error.failure)
                failures.append((backend.target.path, error.failure))
        told = ", ".join(f"path {path} {failure.why}" for path, failure in failures)
        kind = Busy if all(failure.busy for _, failure in failures) else NoPathAnswers
        raise kind(f"no path answers: {told}; try again", retry_after_s=1)

    def failed(self, path_index: int, failure: Failure) -> None:
        """A backend failed, before its first byte or after it."""
        self.metrics.failed(self.model.path_id(path_index), failure.kind)
        self._choice.failed(path_index, failure, self.metrics.clock())
        self._tell(path_index, failure.why)

    async def probe(self) -> None:
        """Look at all backends at once."""
        await asyncio.gather(
            *(self._probed(index, backend) for index, backend in enumerate(self._backends) if backend is not None)
        )

    async def close(self) -> None:
        """Hang up on all backends."""
        await asyncio.gather(*(backend.close() for backend in self._backends if backend is not None))

    async def _wanted(self, asked: Forwarded) -> Wanted:
        self.check_name(asked.model)
        routing = self.model.routing(asked.model, asked.route)
        if routing.every is not None or routing.by_router_lm:
            raise BadRequest(
                f"route {routing.name!r} is none of {PLAIN_ROUTES}: a gateway chooses once, before the text", "route"
            )
        if routing.path is not None:
            self.check_name(f"{self.model.name}/{self.model.path_id(routing.path)}")
        self._limits.new_tokens_of(asked.max_tokens)
        async with self._scoring:
            tokens, posterior = await asyncio.to_thread(self._scored, asked, routing.path is None)
        if routing.path is not None:
            return Wanted(routing.path, (routing.path,), tokens)
        try:
            order = self._choice.order(posterior, self.metrics.clock())
        except NoBackend as error:
            raise Busy(f"{error}; come again", math.ceil(error.retry_after_s) or 1) from None
        return Wanted(int(posterior.argmax()), tuple(order), tokens)

    def _scored(self, asked: Forwarded, to_route: bool) -> tuple[int, np.ndarray]:
        """How many tokens the prompt has, and the posterior where it is `to_route`; raises BadRequest."""
        tokenizer = self._artefact.tokenizer
        tokens = self._limits.tokens_of(asked.prompt, tokenizer, "messages" if asked.chat else "prompt")
        if not to_route:
            return len(tokens), np.zeros(0)
        begun = isinstance(asked.prompt, tuple) and tokens[:1] == [tokenizer.bos_id]
        text = tokens if begun else [tokenizer.bos_id, *tokens]
        return len(tokens), self._router.route(np.array(text, np.int64))[0]

    async def _asked(self, backend: Backend, path_index: int, wanted: Wanted, asked: Forwarded) -> Forwarding:
        """Raises BackendFailed."""
        body = asked.body(backend.target.model, self._max_tokens(asked, wanted.prompt_tokens))
        began_s = self.metrics.clock()
        answer = await (backend.stream(body) if asked.stream else backend.whole(body))
        path, first_choice = backend.target.path, self.model.path_id(wanted.first_choice)
        self.metrics.forwarded(path, first_choice, asked.stream, self.metrics.clock() - began_s)
        self._choice.answered(path_index)
        self._tell(path_index, "")
        return Forwarding(path, first_choice, path_index, answer)

    def _max_tokens(self, asked: Forwarded, prompt_tokens: int) -> int | None:
        """What a backend is asked for: of a chat that sets no bound, what one sequence has room for."""
        if asked.max_tokens is not None or not asked.chat:
            return asked.max_tokens
        room = self._artefact.base.config.sequence_length - 1 - prompt_tokens
        return max(1, min(self._limits.new_tokens, room))

    async def _probed(self, path_index: int, backend: Backend) -> None:
        failure, names = await backend.probe()
        self._choice.probed(path_index, failure)
        self._tell(path_index, "" if failure is None else failure.why)
        model, path = backend.target.model, backend.target.path
        if names and path not in self._told_names and not any(name.partition(":")[0] == model for name in names):
            if model not in names:
                self._told_names.add(path)
                self._say(f"the backend of path {path} lists no model {model!r}; it has {', '.join(names[:5])}")

    def _tell(self, path_index: int, why: str) -> None:
        """Say it once when a backend comes or goes."""
        path = self.model.path_id(path_index)
        is_up = self._choice.up(path_index, self.metrics.clock())
        if is_up != self._told_up[path]:
            self._told_up[path] = is_up
            self._say(
                f"the backend of path {path} is back" if is_up else f"the backend of path {path} is down: it {why}"
            )
