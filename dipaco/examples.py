"""Prompts continued by the paths of a run, each by the one that the router picks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.plan import BASE, MIXTURE
from coordinator.snapshot import RunSnapshot
from corpus.installed import EXAMPLE_PROMPTS
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from inference.engine import Engine, Request
from inference.module_cache import ModuleCache, verify_module
from inference.path_source import PathSource
from inference.sampling import Sampling
from model.path import load_path
from routing.frozen import read_router
from routing.router import FeatureRouter, OnePath, Router

__all__ = ["EXAMPLE_PROMPTS", "Continuation", "Wish", "continuations", "routed_examples"]

CACHE_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Wish:
    """How prompts are continued. `every`: route again after so many tokens; `path`: no routing, this path id."""

    tokens: int
    sampling: Sampling
    every: int | None = None
    path: str | None = None


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
    """Each prompt continued; raises RunUnusable before the run has modules, UnknownPath, Refused without a router."""
    model = MIXTURE if MIXTURE in snapshot.models() else BASE
    topology = snapshot.plan.topology(model)
    path_index = None if wish.path is None else topology.path_index(wish.path)
    tokenizer = Tokenizer.from_file(snapshot.tokenizer_path)
    router = OnePath() if topology.num_paths == 1 or path_index is not None else _router(snapshot)
    engine = Engine(
        _paths(snapshot, model), router, _prefix_tokens(snapshot), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
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


def _paths(snapshot: RunSnapshot, model: str) -> PathSource:
    snapshot.modules(model)
    digests = {row.module_id: row.params.digest for row in snapshot.state.modules_of(model)}
    return PathSource(
        snapshot.config.experiment.model,
        snapshot.vocab_size,
        snapshot.plan.topology(model),
        digests,
        ModuleCache(snapshot.store, CACHE_BYTES),
    )


def _router(snapshot: RunSnapshot) -> Router:
    if snapshot.router_path is None:
        raise Refused("this run has no router (its shards are random); name a path: --path I.J")
    router = read_router(snapshot.router_path.read_bytes())
    files = {module_id: path for module_id, (_, path) in snapshot.base_modules().items()}
    for module_id, path in files.items():
        verify_module(snapshot.store, module_id, path.name)
    base = load_path(snapshot.config.experiment.model, snapshot.vocab_size, snapshot.plan.dense, files)
    return FeatureRouter(base.eval().requires_grad_(False), router)
