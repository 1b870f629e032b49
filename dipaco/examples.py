"""Prompts continued by the paths of a run, each by the one that the router picks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.plan import BASE, MIXTURE
from coordinator.snapshot import RunSnapshot
from coordinator.state import Version
from corpus.installed import EXAMPLE_PROMPTS
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from dipaco.run_router import open_router
from inference.engine import Engine, Request
from inference.module_cache import ModuleCache
from inference.path_source import PathSource
from inference.sampling import Sampling
from routing.router import FeatureRouter, OnePath, Router

__all__ = ["EXAMPLE_PROMPTS", "Continuation", "Wish", "continuations", "routed_examples"]

CACHE_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Wish:
    """How prompts are continued. `every`: route again after so many tokens; `path`: no routing, this path id.

    `version`: of every path, its newest modules or those it did best with.
    """

    tokens: int
    sampling: Sampling
    every: int | None = None
    path: str | None = None
    version: Version = "last"


@dataclass(frozen=True, slots=True)
class Continuation:
    """A prompt, the text that continues it, and the paths that wrote it, in order."""

    prompt: str
    text: str
    paths: tuple[str, ...]
    tokens: int
    finish: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def continuations(snapshot: RunSnapshot, prompts: Sequence[str], wish: Wish) -> Iterator[Continuation]:
    """Each prompt continued; raises RunUnusable where the run lacks modules, UnknownPath, Refused without a router."""
    model = MIXTURE if MIXTURE in snapshot.models() else BASE
    topology = snapshot.plan.topology(model)
    path_index = None if wish.path is None else topology.path_index(wish.path)
    tokenizer = Tokenizer.from_file(snapshot.tokenizer_path)
    router = OnePath() if topology.num_paths == 1 or path_index is not None else _router(snapshot)
    paths = _paths(snapshot, model, wish.version)
    engine = Engine(paths, router, _prefix_tokens(snapshot), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    for prompt in prompts:
        request = Request(tokenizer.encode(prompt), wish.tokens, wish.sampling, wish.every, path_index)
        written = list(engine.generate(request))
        taken = [topology.path_id(token.path_index) for token in written]
        yield Continuation(
            prompt=prompt,
            text=tokenizer.decode([token.token for token in written]),
            paths=tuple(path for place, path in enumerate(taken) if place == 0 or path != taken[place - 1]),
            tokens=len(written),
            finish=written[-1].finish or "",
        )


def routed_examples(snapshot: RunSnapshot) -> Iterator[Continuation]:
    """One continuation for every kind of text in the embedded corpus; none where the run has no router."""
    if snapshot.router_path is None and snapshot.topology.num_paths > 1:
        return iter(())
    wish = Wish(tokens=60, sampling=Sampling(temperature=0.7, top_k=40))
    return continuations(snapshot, list(EXAMPLE_PROMPTS.values()), wish)


def _prefix_tokens(snapshot: RunSnapshot) -> int:
    return snapshot.config.experiment.sharding.prefix_tokens


def _paths(snapshot: RunSnapshot, model: str, version: Version) -> PathSource:
    return PathSource(
        snapshot.config.experiment.model,
        snapshot.vocab_size,
        snapshot.plan.topology(model),
        [[module.blob.digest for module in path.modules] for path in snapshot.paths(model, version)],
        ModuleCache(snapshot.store, CACHE_BYTES),
    )


def _router(snapshot: RunSnapshot) -> Router:
    if snapshot.router_path is None:
        raise Refused("this run has no router (its shards are random); name a path: --path I.J")
    router = open_router(snapshot)
    return FeatureRouter(router.base, router.frozen)
