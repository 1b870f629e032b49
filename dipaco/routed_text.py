"""One text and its router: which path, how sure, and why: what that path was trained on, near to the text.

The looks of the router are those of generation: the first prefix, then every W tokens the last ones before.

Legend: k examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64

from coordinator.plan import MIXTURE, seed_of
from coordinator.snapshot import RunSnapshot
from corpus.tokenizer import Tokenizer
from dipaco.ending import Refused
from dipaco.run_router import RunRouter, open_router
from dipaco.training_sample import TrainingSample, domain_shares, one_line, take_sample
from routing.features import first_prefix
from routing.neighbours import most_typical, nearest, own_distances
from routing.router import FeatureRouter, RouteState

EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Look:
    """What a look of the router decided: the path of tokens `first`..`last` (counted from 1, BOS apart)."""

    first: int
    last: int
    path: str
    probability: float
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """A training sequence of the path, and how far its features are (Euclidean, in the router's space)."""

    domain: str
    distance: float
    text: str


@dataclass(frozen=True, slots=True)
class Reason:
    """What the path's shards hold, and sampled sequences of them: near to the text, and near to their own mean.

    `usual_distance` is the median of what a sampled sequence has to the nearest of another document, `as_far` the share
    of them that are as far from it as the text is from its nearest: near 0 the text is like nothing in the path.
    """

    sequences: int
    sampled: int
    domains: dict[str, float]
    nearest: tuple[Example, ...]
    typical: tuple[Example, ...]
    usual_distance: float | None
    as_far: float | None


@dataclass(frozen=True, slots=True)
class RoutedText:
    """A text's path with the posterior over all paths, most likely first. `tokens` are without BOS."""

    run: str
    router: dict[str, Any]
    tokens: int
    prefix_tokens: int
    prefix: str
    warning: str | None
    path: str
    posterior: dict[str, float]
    chunks: tuple[Look, ...]
    why: Reason | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def route_text(
    snapshot: RunSnapshot,
    text: str,
    *,
    every: int | None,
    sample: int,
    say: Callable[[str], None] = lambda line: None,
) -> RoutedText:
    """The path of a text, and for `sample` above 0 the reason, from so many sequences of the path's shards.

    Raises Refused for a text without tokens and where the run has no router, RunUnusable, DamagedModule.
    """
    router = open_router(snapshot)
    tokenizer = Tokenizer.from_file(snapshot.tokenizer_path)
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int64)
    if len(tokens) == 1:
        raise Refused("there is nothing to route: the text is empty")
    prefix = first_prefix(tokens, router.frozen.prefix_tokens)
    posterior, _ = FeatureRouter(router.base, router.frozen).route(prefix)
    path_index = int(posterior.argmax())
    path_id = snapshot.topology.path_id
    return RoutedText(
        run=snapshot.config.name,
        router=described(router),
        tokens=len(tokens) - 1,
        prefix_tokens=len(prefix) - 1,
        prefix=tokenizer.decode(prefix[1:].tolist()),
        warning=_warning(len(tokens) - 1, router.frozen.prefix_tokens),
        path=path_id(path_index),
        posterior={path_id(int(index)): float(posterior[index]) for index in np.argsort(-posterior, kind="stable")},
        chunks=_looks(snapshot, router, tokenizer, tokens, every) if every else (),
        why=_reason(snapshot, router, tokenizer, path_index, prefix, sample, say) if sample else None,
    )


def described(router: RunRouter) -> dict[str, Any]:
    """A router by what it is: its kind, its paths, the tokens that it looks at, and its version."""
    frozen = router.frozen
    return {
        "kind": type(frozen).__name__.lower(),
        "paths": frozen.num_paths,
        "prefix_tokens": frozen.prefix_tokens,
        "version": frozen.version,
    }


def _warning(tokens: int, prefix_tokens: int) -> str | None:
    if tokens >= prefix_tokens:
        return None
    return (
        f"the text has {tokens} tokens, the router was made for {prefix_tokens}: it decides on less than it was "
        f"fitted to, and decides again when {prefix_tokens} are there"
    )


def _looks(
    snapshot: RunSnapshot, router: RunRouter, tokenizer: Tokenizer, tokens: npt.NDArray[np.int64], every: int
) -> tuple[Look, ...]:
    """Every look on the way through the text; the tokens of the prefix go with the first."""
    ends = [*range(1 + router.frozen.prefix_tokens + every, len(tokens), every), len(tokens)]
    serving = FeatureRouter(router.base, router.frozen)
    state: RouteState | None = None
    looks: list[Look] = []
    start = 1
    for end in ends:
        seen = tokens[:start] if looks else first_prefix(tokens, router.frozen.prefix_tokens)
        posterior, state = serving.route(seen, state)
        chosen = int(posterior.argmax())
        looks.append(
            Look(
                first=start,
                last=end - 1,
                path=snapshot.topology.path_id(chosen),
                probability=float(posterior[chosen]),
                text=one_line(tokenizer.decode(tokens[start:end].tolist())),
            )
        )
        start = end
    return tuple(looks)


def _reason(
    snapshot: RunSnapshot,
    router: RunRouter,
    tokenizer: Tokenizer,
    path_index: int,
    prefix: npt.NDArray[np.int64],
    sequences: int,
    say: Callable[[str], None],
) -> Reason:
    shards = [shard for shard in snapshot.state.shards_of(MIXTURE) if shard.path_index == path_index]
    files = [snapshot.store.path(file.digest) for shard in shards for file in shard.files]
    seed = seed_of(snapshot.config.experiment.seed, "route", path_index)
    sample = take_sample(files, router, sequences, seed, say)
    rows, point = router.frozen.transform(sample.z), router.frozen.transform(router.features([prefix]))[0]
    chosen, distances = nearest(rows, point, sample.documents, EXAMPLES)
    own = own_distances(rows, sample.documents)
    comparable = bool(np.isfinite(own).all())
    return Reason(
        sequences=sum(shard.sequences for shard in shards),
        sampled=len(sample),
        domains=domain_shares(files),
        nearest=_examples(sample, tokenizer, chosen, distances),
        typical=_examples(sample, tokenizer, *most_typical(rows, sample.documents, EXAMPLES)),
        usual_distance=float(np.median(own)) if comparable else None,
        as_far=float((own >= distances[0]).mean()) if comparable else None,
    )


def _examples(
    sample: TrainingSample,
    tokenizer: Tokenizer,
    chosen: npt.NDArray[np.int64],
    distances: Float64[np.ndarray, " k"],
) -> tuple[Example, ...]:
    return tuple(
        Example(sample.domains[index], float(distance), sample.excerpt(int(index), tokenizer))
        for index, distance in zip(chosen, distances, strict=True)
    )
