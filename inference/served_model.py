"""What a server answers with: the names of its models, its tokenizer, its limits, and the newest snapshot's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from configs.routes import FIXED, UnknownRoute, parse_route
from corpus.tokenizer import Tokenizer
from inference.request_errors import BadRequest, UnknownModel
from model.topology import UnknownPath

_USUAL_TOKEN = 16  # characters that any vocabulary may have in one token, such as those for unknown words
ROUTES = "sequence, every:W, router:W or path:I.J"
BASE_MODEL_NOTE = "a base model: it continues text and was not trained to follow instructions"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request: tokens of a prompt, new tokens, texts; of the server: generations at a time and waiting."""

    prompt_tokens: int
    new_tokens: int
    texts: int = 16
    running: int = 16
    waiting: int = 64

    @property
    def most_texts(self) -> int:
        """Of one request: more can never be taken in together."""
        return min(self.texts, self.running + self.waiting)

    def new_tokens_of(self, asked: int | None) -> int:
        """How many tokens are written where `asked` are asked for; raises BadRequest."""
        if asked is not None and asked > self.new_tokens:
            raise BadRequest(f"max_tokens is {asked}, this server writes up to {self.new_tokens}", "max_tokens")
        return asked or self.new_tokens

    def tokens_of(self, prompt: str | Sequence[int], tokenizer: Tokenizer, name: str) -> list[int]:
        """The token ids of a prompt, which is the field `name` of a request; raises BadRequest."""
        most = self.prompt_tokens * (max(tokenizer.longest_token, _USUAL_TOKEN) if isinstance(prompt, str) else 1)
        if len(prompt) > most:  # before any work that grows with the prompt
            unit = "characters" if isinstance(prompt, str) else "tokens"
            raise self._too_long(f"{len(prompt)} {unit}", name)
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if len(tokens) > self.prompt_tokens:
            raise self._too_long(f"{len(tokens)} tokens", name)
        beyond = [token for token in tokens if token >= tokenizer.vocab_size]
        if beyond:
            last = tokenizer.vocab_size - 1
            raise BadRequest(f"token {beyond[0]} is not in the vocabulary, whose ids are 0 to {last}", name)
        return tokens

    def _too_long(self, length: str, name: str) -> BadRequest:
        return BadRequest(
            f"the prompt has {length}, this server takes {self.prompt_tokens} tokens; shorten it",
            name,
            "context_length_exceeded",
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """How the paths of a text are chosen; the fields are those of an engine's request."""

    name: str
    every: int | None = None
    path: int | None = None
    by_router_lm: bool = False


class PathNames(Protocol):
    """What is to be known of a topology here."""

    @property
    def num_paths(self) -> int: ...

    def path_id(self, path_index: int) -> str: ...

    def path_index(self, path_id: str) -> int:
        """Raises UnknownPath."""
        ...


@dataclass(slots=True)
class ServedModel:
    """One run. Its topology and tokenizer never change; what follows its newer snapshots is `snapshot` and the flags.

    `name` stands for the mixture, `name/I.J` for one path of it. `has_router`: several paths can be told apart.
    """

    name: str
    topology: PathNames
    tokenizer: Tokenizer
    created_s: int
    has_router: bool
    has_router_lm: bool
    snapshot: str

    @property
    def names(self) -> list[str]:
        """The mixture, then its paths."""
        paths = [f"{self.name}/{self.path_id(index)}" for index in range(self.topology.num_paths)]
        return [self.name, *(paths if len(paths) > 1 else [])]

    def path_id(self, path_index: int) -> str:
        return self.topology.path_id(path_index)

    def check_name(self, name: str) -> None:
        """Raises UnknownModel."""
        if name not in self.names:
            raise UnknownModel(
                f"there is no model {name!r} here; this server has {self.name!r} and paths like {self.names[-1]!r}",
                "model",
            )

    def routing(self, model: str, route: str | None) -> Routing:
        """How a request for a model is routed; raises UnknownModel, UnknownPath and BadRequest."""
        self.check_name(model)
        if model != self.name:
            wanted = FIXED + model.removeprefix(f"{self.name}/")
            if route not in (None, wanted):
                raise BadRequest(
                    f"model {model!r} is one path; leave route {route!r} out or ask for {self.name!r}", "route"
                )
            route = wanted
        return self._routed(route or "sequence")

    def _routed(self, name: str) -> Routing:
        if name.startswith(FIXED):
            try:
                return Routing(name, path=self.topology.path_index(name.removeprefix(FIXED)))
            except UnknownPath as error:
                raise BadRequest(str(error), "route") from None
        try:
            route = parse_route(name)
        except UnknownRoute:
            raise BadRequest(f"route {name!r} is none of {ROUTES}", "route") from None
        if route.kind not in ("sequence", "every", "router"):
            raise BadRequest(f"route {name!r} is for measuring; this server writes by {ROUTES}", "route")
        if self.topology.num_paths == 1:
            return Routing(name, path=0)
        if route.kind == "router" and not self.has_router_lm:
            raise BadRequest(f"route {name!r} needs a trained router LM, which this run has not", "route")
        if route.kind != "router" and not self.has_router:
            raise BadRequest("this run has no router (its shards are random): ask for one path, as path:I.J", "route")
        return Routing(name, every=route.interval, by_router_lm=route.kind == "router")
