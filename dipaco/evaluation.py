"""Measures a run again from its directory: the tasks of the evaluate stage, carried out here on local files.

The same functions as on workers and in the coordinator: on the same machine the numbers are those of the report.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from configs.corpus import CorpusConfig, FilesSource, SplitsConfig, TokenizerConfig
from configs.routes import FIXED, UnknownRoute, chunk_tokens, parse_route, router_intervals
from coordinator.evaluation_steps import REPORTED
from coordinator.plan import MIXTURE, ROUTER, blob
from coordinator.snapshot import RunSnapshot
from coordinator.state import Version
from corpus.builder import build_corpus, tokenize_range
from corpus.tokenizer import Tokenizer
from dipaco.asking import plain
from dipaco.ending import Refused
from dipaco.local_tasks import LocalTasks
from dipaco.run_router import refuse_without_router_lm
from model.store import BlobStore
from protocol.tasks import BlobRef, EvaluateSpec, FeaturizeSpec, PathRef
from routing.evaluation import beside, measures, summarise
from routing.prediction import chosen
from routing.records import MIN_EVALUATED_TOKENS, Losses, Routes
from routing.tables import LossTable, RouteTable

"""And a path id: the route that always takes this path."""
HELD_OUT = ("validation", "test")


@dataclass(frozen=True, slots=True)
class Text:
    """Token files to measure on, and how many of the sequences of each."""

    files: tuple[BlobRef, ...]
    store: BlobStore
    max_sequences: int | None


class Evaluation:
    """Evaluates models of one run on one text, by routes that may ask for chunks of several sizes."""

    def __init__(
        self,
        snapshot: RunSnapshot,
        text: Text,
        routes: Sequence[str],
        say: Callable[[str], None],
        versions: Sequence[Version] = ("last",),
    ) -> None:
        """`versions`: at which the mixture is measured, each under a name of its own."""
        self._snapshot, self._text, self._say = snapshot, text, say
        self._versions = versions
        self._measured: dict[tuple[str, ...], list[Losses]] = {}
        self._plan, self._state = snapshot.plan, snapshot.state
        self._fixed = [route for route in routes if route.startswith(FIXED)]
        self._routes = [route for route in routes if not route.startswith(FIXED)]
        self._chunk_tokens = chunk_tokens(self._routes)
        self._tasks = LocalTasks(snapshot, text.store)

    def run(self) -> dict[str, Any]:
        """The summary of routing.evaluation, with fixed paths (`path:I.J`) beside the routes."""
        if self._fixed and MIXTURE not in self._plan.evaluated_models():
            raise Refused(f"route {self._fixed[0]!r} names a path of the mixture, and this run trains none")
        first, *others = self._versions
        tables = {model: self.losses(model, first) for model in self._plan.evaluated_models()}
        if not next(iter(tables.values())).tokens:
            raise Refused(
                f"no document of the text has the {MIN_EVALUATED_TOKENS} tokens that an evaluation needs; "
                "give longer documents"
            )
        wants_router = MIXTURE in tables and any(parse_route(route).needs_router for route in self._routes)
        routes = self._routed() if wants_router else None
        looks = self._looked() if MIXTURE in tables else None
        summary = summarise(tables, MIXTURE, routes, self._routes, self._chunk_tokens, REPORTED[first], looks=looks)
        mixtures = {first: tables[MIXTURE]} if MIXTURE in tables else {}
        for version in others if mixtures else []:
            mixtures[version] = self.losses(MIXTURE, version)
            only = {MIXTURE: mixtures[version]}
            more = summarise(only, MIXTURE, routes, self._routes, self._chunk_tokens, REPORTED[version], looks=looks)
            summary = beside(summary, more)
        for route in self._fixed:
            for version, table in mixtures.items():
                self._add_path(summary, table, route, REPORTED[version])
        return summary

    def _add_path(self, summary: dict[str, Any], table: LossTable, route: str, name: str) -> None:
        path_index = self._snapshot.topology.path_index(route.removeprefix(FIXED))
        measured = measures(table, chosen(table, np.full(table.count.shape, path_index, np.int64)))
        for key in ("perplexity", "bits_per_byte"):
            summary[key].setdefault(name, {})[route] = measured[key]
        for domain, perplexity in measured["per_domain"].items():
            summary["per_domain"].setdefault(domain, {}).setdefault(name, {})[route] = perplexity

    def losses(self, model: str, version: Version = "last") -> LossTable:
        """The losses of the text under every path of a model; of paths with the same modules they are computed once."""
        paths = []
        for path_index in range(self._plan.topology(model).num_paths):
            path = self._plan.path_ref(self._state, model, path_index, version)
            modules = tuple(module.blob.digest for module in path.modules)
            if modules not in self._measured:
                self._say(f"evaluating {model} path {self._plan.topology(model).path_id(path_index)}")
                self._measured[modules] = [self._losses_of(path, tokens) for tokens in self._text.files]
            paths.append(self._measured[modules])
        return LossTable.join(paths)

    def _losses_of(self, path: PathRef, tokens: BlobRef) -> Losses:
        experiment = self._snapshot.config.experiment
        spec = EvaluateSpec(
            path=path,
            tokens=tokens,
            prefix_tokens=experiment.sharding.prefix_tokens,
            chunk_tokens=self._chunk_tokens,
            numerics=self._plan.numerics,
            max_sequences=self._text.max_sequences,
            tokenizer=blob(self._snapshot.corpus["tokenizer"]),
        )
        return Losses.from_bytes(self._tasks.output(spec, "losses"))

    def _routed(self) -> RouteTable | None:
        router = self._plan.router(self._state)
        if router is None:
            return None
        self._say("routing")
        base, intervals = self._plan.base_path(self._state), router_intervals(self._routes)
        return self._route_table("route", base, intervals, router)

    def _looked(self) -> RouteTable | None:
        """What the router LM chooses, where a route asks it and the run has it."""
        intervals = router_intervals(self._routes, "router")
        if not intervals or not self._state.modules_of(ROUTER):
            return None
        self._say("routing by the router LM")
        return self._route_table("look", self._plan.path_ref(self._state, ROUTER, 0), intervals)

    def _route_table(
        self, mode: Literal["route", "look"], base: PathRef, intervals: list[int], router: BlobRef | None = None
    ) -> RouteTable:
        records = []
        for tokens in self._text.files:
            spec = FeaturizeSpec(
                mode=mode,
                base=base,
                tokens=tokens,
                prefix_tokens=self._snapshot.config.experiment.sharding.prefix_tokens,
                numerics=self._plan.numerics,
                router=router,
                intervals=intervals,
                max_sequences=self._text.max_sequences,
            )
            records.append(Routes.from_bytes(self._tasks.output(spec, "routes")))
        return RouteTable.join(records)


def evaluate_run(
    snapshot: RunSnapshot,
    *,
    data: Path | None = None,
    split: str | None = None,
    routes: Sequence[str] | None = None,
    versions: Sequence[Version] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Perplexities of all models, on a held-out split of the run (its evaluation.split by default) or on `data`.

    The mixture is measured at `versions`; by default as the run itself does: the last, and the best where it keeps it.
    Raises Refused, UnknownRoute, UnknownPath, BadCorpus, DamagedModule, and RunUnusable where a model of the run has
    not begun, or no best version is kept.
    """
    versions = versions or (("last",) if snapshot.config.experiment.early_stopping is None else ("last", "best"))
    for model in snapshot.plan.evaluated_models():
        for version in versions:
            snapshot.paths(model, version)
    evaluation = snapshot.config.experiment.evaluation
    wanted = list(routes or evaluation.routes)
    for route in wanted:
        _check(route, snapshot)
    if data is None:
        split = split or evaluation.split
        if split not in HELD_OUT:
            raise Refused(f"split {split!r} is none of {', '.join(HELD_OUT)}")
        parts = [part for part in snapshot.plan.ranges(snapshot.state, split) if part["sequences"]]
        text = Text(tuple(blob(part["file"]) for part in parts), snapshot.store, evaluation.max_sequences)
        if not parts:
            raise Refused(f"split {split!r} of the run holds no sequence; raise its share in corpus.splits")
        return shaped(snapshot, {**Evaluation(snapshot, text, wanted, say, versions).run(), "split": split})
    if split is not None:
        raise Refused("--data is measured whole; leave --split out")
    with tempfile.TemporaryDirectory(prefix="dipaco-data-") as scratch:
        text = tokenized(snapshot, data, BlobStore(Path(scratch)))
        return shaped(snapshot, {**Evaluation(snapshot, text, wanted, say, versions).run(), "split": str(data)})


def _check(route: str, snapshot: RunSnapshot) -> None:
    """Raise UnknownRoute or UnknownPath where the run does not offer a route."""
    if route.startswith(FIXED):
        snapshot.topology.path_index(route.removeprefix(FIXED))
        return
    try:
        known = parse_route(route)
    except UnknownRoute as error:
        raise UnknownRoute(f"{error}, nor {FIXED}I.J") from None
    known.check(snapshot.topology.num_paths)
    if known.kind == "router" and snapshot.topology.num_paths > 1:
        refuse_without_router_lm(snapshot)


def shaped(snapshot: RunSnapshot, summary: dict[str, Any]) -> dict[str, Any]:
    """An evaluation as reports have it: loads by path id, token counts under one key."""
    topology = snapshot.topology
    loads = {
        route: {topology.path_id(path_index): share for path_index, share in enumerate(shares)}
        for route, shares in summary["path_load"].items()
    }
    return plain({**summary, "path_load": loads, "tokens": {"evaluated": summary["tokens"]}})


def tokenized(snapshot: RunSnapshot, data: Path, store: BlobStore) -> Text:
    """The documents of a file as token files in `store`, cut as the run's own; raises BadCorpus."""
    nothing_held_out = SplitsConfig(router=0, stop=0, validation=0, test=0)
    config = CorpusConfig(
        source=FilesSource(kind="files", paths=[str(data)]),
        splits=nothing_held_out,
        min_document_characters=1,
        deduplicate=False,
    )
    tokenizer_path = snapshot.tokenizer_path
    manifest = build_corpus(
        config, TokenizerConfig(kind="file", path=str(tokenizer_path)), store, lambda what, done, expected: None
    )
    tokenizer = Tokenizer.from_file(tokenizer_path)
    files = []
    for part in manifest.ranges:
        out = store.scratch() / "tokens"
        length = snapshot.config.experiment.model.sequence_length
        tokenize_range(store.path(part.digest), tokenizer, length, part.index, out)
        digest, size = store.put_file(out)
        files.append(BlobRef(digest=digest, size=size))
    return Text(tuple(files), store, None)
