"""A zero-shot cloze on held-out text for every model of a run: which of four endings is the likeliest?

A task where a model that is as good by perplexity may be worse. Routes are decided from contexts alone: the routers
read token files that hold no ending. Losses are those of the evaluate stage's tasks, on token files of the items.

Legend: n items, C chunks of the context after the prefix, P paths.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float64

from configs.routes import FIXED, parse_route
from coordinator.evaluation_steps import REPORTED
from coordinator.plan import BASE, MIXTURE, ROUTER
from coordinator.snapshot import RunSnapshot
from coordinator.state import Version
from corpus.token_file import SequenceIndex, TokenFile, dtype_for, write_token_file
from dipaco.asking import plain
from dipaco.cloze_items import CHANCE, ENDINGS, ClozeForm, ClozeItems, cloze_items
from dipaco.cloze_routes import Chooser, Grid, check, depends_on_the_context_alone, intervals_of
from dipaco.cloze_score import KEYS, likelihoods, scores
from dipaco.ending import Refused
from dipaco.evaluation import HELD_OUT
from dipaco.local_tasks import LocalTasks
from dipaco.run_router import refuse_without_router_lm
from model.store import BlobStore
from protocol.tasks import BlobRef, EvaluateSpec, FeaturizeSpec, PathRef
from routing.records import MIN_EVALUATED_TOKENS, Losses, Routes
from routing.tables import RouteTable

Say = Callable[[str], None]
What = Literal["contexts", "endings", "endings alone"]


class ItemLosses:
    """Losses (nats) of the items under any path, each computed once, when it is first needed."""

    def __init__(self, snapshot: RunSnapshot, items: ClozeItems, grid: Grid, store: BlobStore, say: Say) -> None:
        self._snapshot, self._items, self._grid, self._store, self._say = snapshot, items, grid, store, say
        self._tasks = LocalTasks(snapshot, store)
        vocab_size = snapshot.vocab_size
        # Behind a context stand meaningless tokens, which nothing that is taken of this file has read.
        behind = max(1, MIN_EVALUATED_TOKENS - items.contexts.shape[1])
        contexts = np.repeat(items.contexts[:, None], ENDINGS, axis=1)  # (n, 4, 1 + N)
        self._files: dict[What, BlobRef] = {
            "contexts": _token_file(store, np.pad(items.contexts, ((0, 0), (0, behind))), vocab_size),
            "endings": _token_file(store, np.concatenate([contexts, items.endings], axis=2), vocab_size),
            "endings alone": _token_file(
                store, np.concatenate([contexts[:, :, :1], items.endings], axis=2), vocab_size
            ),
        }
        self._known: dict[tuple[str, tuple[str, ...]], npt.NDArray[np.float64]] = {}

    def endings(
        self, paths: Sequence[PathRef], needed: Bool[np.ndarray, "n P"], *, alone: bool
    ) -> Float64[np.ndarray, "n 4 P"]:
        """Of the four endings behind their context, or behind BOS `alone`; what is not needed may be nan."""
        what: What = "endings alone" if alone else "endings"
        before, count = 0 if alone else self._grid.context_tokens, self._items.endings.shape[2]
        columns = [
            self._of_path(what, path, needed[:, index], ENDINGS, before, count) for index, path in enumerate(paths)
        ]
        return np.stack(columns, axis=2)

    def contexts(self, paths: Sequence[PathRef], needed: Bool[np.ndarray, "n P"]) -> Float64[np.ndarray, "n C P"]:
        """Of the contexts after the prefix, by chunk; what is not needed may be nan."""
        grid = self._grid
        columns = [
            self._of_path("contexts", path, needed[:, index], grid.num_chunks, grid.prefix_tokens, grid.chunk_tokens)
            for index, path in enumerate(paths)
        ]
        return np.stack(columns, axis=2)

    def _of_path(
        self,
        what: What,
        path: PathRef,
        needed: Bool[np.ndarray, " n"],
        columns: int,
        prefix_tokens: int,
        chunk_tokens: int,
    ) -> npt.NDArray[np.float64]:
        """(n, columns): four endings, each the first chunk of a sequence, or the first chunks of a context."""
        key = what, tuple(module.blob.digest for module in path.modules)
        known = self._known.setdefault(key, np.full((len(self._items), columns), np.nan))
        missing = np.flatnonzero(needed & np.isnan(known[:, 0]))
        if not len(missing):
            return known
        topology = self._snapshot.plan.topology(path.model)
        name = f"{what} under {path.model} path {topology.path_id(path.path_index)}"
        rows = 1 if what == "contexts" else ENDINGS
        positions = (missing[:, None] * rows + np.arange(rows)).ravel()
        digest, size = self._store.put_bytes(positions.astype("<u4").tobytes())
        spec = EvaluateSpec(
            path=path,
            tokens=self._files[what],
            prefix_tokens=prefix_tokens,
            chunk_tokens=chunk_tokens,
            numerics=self._snapshot.plan.numerics,
            selection=BlobRef(digest=digest, size=size),
        )
        record = self._tasks.output(
            spec,
            "losses",
            lambda done, loss, tokens: self._say(f"{name}: {done // rows:,} of {len(missing):,} items"),
        )
        losses = Losses.from_bytes(record).loss[:, : columns // rows]
        known[missing] = losses.reshape(len(missing), columns)
        return known

    def routed(
        self, mode: Literal["route", "look"], base: PathRef, intervals: list[int], router: BlobRef | None = None
    ) -> RouteTable:
        """What a router makes of the contexts."""
        self._say("routing the contexts" + (" by the router LM" if mode == "look" else ""))
        spec = FeaturizeSpec(
            mode=mode,
            base=base,
            tokens=self._files["contexts"],
            prefix_tokens=self._grid.prefix_tokens,
            numerics=self._snapshot.plan.numerics,
            router=router,
            intervals=intervals,
        )
        return RouteTable.join([Routes.from_bytes(self._tasks.output(spec, "routes"))])


class Cloze:
    """Measures all models of a run on the same items."""

    def __init__(self, snapshot: RunSnapshot, items: ClozeItems, form: ClozeForm, routes: Sequence[str]) -> None:
        self._snapshot, self._items, self._routes = snapshot, items, list(routes)
        prefix_tokens = snapshot.config.experiment.sharding.prefix_tokens
        chunk = math.gcd(form.context_tokens - prefix_tokens, *intervals_of(routes, "likelihood"))
        self._grid = Grid(form.context_tokens, prefix_tokens, chunk)

    def run(self, versions: Sequence[Version], say: Say) -> dict[str, Any]:
        """KEYS {model: x, mixture: {route: x}}, overall and per_domain."""
        counts = np.bincount(self._items.domains, minlength=len(self._items.domain_names)).tolist()
        named = zip(self._items.domain_names, counts, strict=True)
        found: dict[str, Any] = {key: {} for key in KEYS}
        found["per_domain"] = {name: {"items": count, **{key: {} for key in KEYS}} for name, count in named if count}
        with tempfile.TemporaryDirectory(prefix="dipaco-cloze-") as scratch:
            losses = ItemLosses(self._snapshot, self._items, self._grid, BlobStore(Path(scratch)), say)
            for model in measured_models(self._snapshot):
                if model != MIXTURE:
                    self._enter(found, model, None, self._snapshot.paths(model), losses)
                    continue
                routes, looks = self._routed(losses)
                for version in versions:
                    self._enter(found, model, (routes, looks), self._snapshot.paths(model, version), losses, version)
        return found

    def _routed(self, losses: ItemLosses) -> tuple[RouteTable | None, RouteTable | None]:
        """What the routers choose that the routes ask for, where the run has them."""
        plan, state = self._snapshot.plan, self._snapshot.state
        known = [parse_route(route) for route in self._routes if not route.startswith(FIXED)]
        routes, looks = None, None
        router, intervals = plan.router(state), intervals_of(self._routes, "router")
        if router is not None and any(route.needs_router for route in known):
            routes = losses.routed("route", plan.base_path(state), intervals_of(self._routes, "every"), router)
        if intervals and state.modules_of(ROUTER):
            looks = losses.routed("look", plan.path_ref(state, ROUTER, 0), intervals)
        return routes, looks

    def _enter(
        self,
        found: dict[str, Any],
        model: str,
        routed: tuple[RouteTable | None, RouteTable | None] | None,
        paths: Sequence[PathRef],
        losses: ItemLosses,
        version: Version = "last",
    ) -> None:
        """Measure one model and note its numbers: the mixture's (which alone has `routed`) by route."""
        wanted, (routes, looks) = (["sequence"], (None, None)) if routed is None else (self._routes, routed)
        topology = self._snapshot.plan.topology(model)
        chooser = Chooser(
            topology, self._grid, len(self._items), routes, looks, lambda needed: losses.contexts(paths, needed)
        )
        chosen = {route: chooser.choose(route) for route in wanted}
        needed = np.zeros((len(self._items), len(paths)), bool)
        for choice in chosen.values():
            np.put_along_axis(needed, choice.paths, True, axis=1)
        behind, alone = (losses.endings(paths, needed, alone=alone) for alone in (False, True))
        for route, choice in chosen.items():
            overall, by_domain = scores(self._items, likelihoods(behind, choice), likelihoods(alone, choice))
            parts = [(found, overall), *((found["per_domain"][name], by_domain[name]) for name in by_domain)]
            for part, numbers in parts:
                for key, value in numbers.items():
                    if routed is None:
                        part[key][model] = value
                    else:
                        part[key].setdefault(REPORTED[version], {})[route] = value


def cloze_run(
    snapshot: RunSnapshot,
    form: ClozeForm,
    *,
    split: str | None = None,
    routes: Sequence[str] | None = None,
    versions: Sequence[Version] | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Make items of a held-out split of the run, and measure all its models on them; plain JSON.

    Without routes those of evaluation.routes that the run can take and that need no ending; without versions the last
    one, and the best one where the run keeps it. Raises Refused, UnknownRoute, UnknownPath, DamagedModule, and
    RunUnusable where a model of the run has not begun, or no best version is kept.
    """
    experiment = snapshot.config.experiment
    form.check(experiment.sharding.prefix_tokens, experiment.model.sequence_length)
    versions = versions or (("last",) if experiment.early_stopping is None else ("last", "best"))
    for model in measured_models(snapshot):
        for version in versions if model == MIXTURE else ("last",):
            snapshot.paths(model, version)
    wanted = list(dict.fromkeys(routes)) if routes else default_routes(snapshot)
    for route in wanted:
        _check(route, snapshot)
    split = split or experiment.evaluation.split
    if split not in HELD_OUT:
        raise Refused(f"split {split!r} is none of {', '.join(HELD_OUT)}")
    say("choosing the items")
    with ExitStack() as stack:
        items = cloze_items([stack.enter_context(TokenFile.open(path)) for path in snapshot.token_files(split)], form)
    found = Cloze(snapshot, items, form, wanted).run(versions, say)
    described = {
        "split": split,
        "items": len(items),
        "documents": len(np.unique(items.documents)),
        "chance": CHANCE,
        "context_tokens": form.context_tokens,
        "ending_tokens": form.ending_tokens,
        "items_digest": items.digest,
        "left_out": list(items.left_out),
    }
    return plain({**described, **found})


def measured_models(snapshot: RunSnapshot) -> list[str]:
    """The base, then what the run's report compares."""
    compared = snapshot.plan.evaluated_models()
    return list(dict.fromkeys([*([BASE] if snapshot.state.modules_of(BASE) else []), *compared]))


def default_routes(snapshot: RunSnapshot) -> list[str]:
    """The run's own routes, as far as they decide before the ending and the run has their router."""
    kept = []
    for name in snapshot.config.experiment.evaluation.routes:
        route = parse_route(name)
        one_path = snapshot.topology.num_paths == 1
        routed = not route.needs_router or snapshot.router_path is not None
        looked = route.kind != "router" or bool(snapshot.state.modules_of(ROUTER))
        if depends_on_the_context_alone(name) and (one_path or (routed and looked)):
            kept.append(name)
    return kept or ["oracle:sequence"]


def _check(route: str, snapshot: RunSnapshot) -> None:
    """Raises Refused, UnknownRoute or UnknownPath where the run does not offer a route."""
    check(route, snapshot.topology)
    if route.startswith(FIXED):
        if MIXTURE not in snapshot.plan.evaluated_models():
            raise Refused(f"route {route!r} names a path of the mixture, and this run trains none")
    elif parse_route(route).kind == "router" and snapshot.topology.num_paths > 1:
        refuse_without_router_lm(snapshot)


def _token_file(store: BlobStore, tokens: npt.NDArray[np.uint32], vocab_size: int) -> BlobRef:
    """Sequences of equal length (the last axis) as a token file in a store."""
    sequences = tokens.reshape(-1, tokens.shape[-1])
    count, length = sequences.shape
    index = SequenceIndex(
        ids=np.arange(count, dtype=np.uint64),
        lengths=np.full(count, length, np.uint32),
        domains=np.zeros(count, np.uint16),
        documents=np.arange(count, dtype=np.uint64),
        domain_names=("cloze",),
    )
    path = store.scratch() / "tokens"
    write_token_file(path, index, dtype_for(vocab_size), sequences)
    digest, size = store.put_file(path)
    return BlobRef(digest=digest, size=size)
