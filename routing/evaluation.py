"""What the losses of all paths say of a route: perplexity, bits per byte, by domain; loads and agreement. Pure numpy.

Every route is a choice of one path a chunk, so one table of losses answers all of them, the oracles included. The
prefix counts for no model (DiPaCo Sec 2.4).

Legend: N sequences, C chunks of the loss grid, P paths, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64, UInt32

from routing.records import Losses, MalformedRecord, Routes


@dataclass(frozen=True, slots=True)
class LossTable:
    """Losses (nats) of the same sequences under every path of one model, with counts that all paths share."""

    loss: Float64[np.ndarray, "N C P"]
    count: UInt32[np.ndarray, "N C"]
    text_bytes: UInt32[np.ndarray, "N C"]
    domains: Int64[np.ndarray, " N"]
    domain_names: tuple[str, ...]

    @classmethod
    def join(cls, paths: Sequence[Sequence[Losses]]) -> LossTable:
        """The table of a model from its records: for each path, one record a token file, files in the same order."""
        names = tuple(sorted({name for record in paths[0] for name in record.domain_names}))
        for path in paths[1:]:
            for record, first in zip(path, paths[0], strict=True):
                same = np.array_equal(record.positions, first.positions) and np.array_equal(record.count, first.count)
                if not same:
                    raise MalformedRecord("two paths were evaluated on different sequences")
        return cls(
            np.stack([np.concatenate([record.loss for record in path]) for path in paths], axis=2),
            np.concatenate([record.count for record in paths[0]]),
            np.concatenate([record.text_bytes for record in paths[0]]),
            np.concatenate([_renamed(record, names) for record in paths[0]]),
            names,
        )

    @property
    def num_paths(self) -> int:
        return int(self.loss.shape[2])

    @property
    def tokens(self) -> int:
        return int(self.count.sum(dtype=np.int64))

    def under(self, choice: npt.NDArray[np.int64]) -> Float64[np.ndarray, "N C"]:
        """The losses with path `choice` (N, C) in each chunk."""
        chosen: npt.NDArray[np.float64] = np.take_along_axis(self.loss, choice[:, :, None], axis=2)[:, :, 0]
        return chosen


def _renamed(record: Losses, names: tuple[str, ...]) -> Int64[np.ndarray, " N"]:
    places = np.array([names.index(name) for name in record.domain_names], np.int64)
    renamed: npt.NDArray[np.int64] = places[record.domains]
    return renamed


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The router's paths for the sequences of a LossTable, in its order."""

    sequence: Int64[np.ndarray, " N"]
    every: dict[int, Int64[np.ndarray, "N c"]]

    @classmethod
    def join(cls, records: Sequence[Routes]) -> RouteTable:
        """From one record a token file, in the order of the losses."""
        every = {
            interval: np.concatenate([record.every[interval] for record in records]).astype(np.int64)
            for interval in records[0].every
        }
        return cls(np.concatenate([record.sequence for record in records]).astype(np.int64), every)


def choose(route: str, table: LossTable, routes: RouteTable | None, chunk_tokens: int) -> Int64[np.ndarray, "N C"]:
    """The path of every chunk under a route; raises ValueError where a routed one has no router."""
    chunks = table.loss.shape[1]
    kind, _, rest = route.partition(":")
    if kind == "oracle":
        interval = int(rest.partition(":")[2] or 0)
        return _oracle(table, interval // chunk_tokens if interval else chunks)
    if table.num_paths == 1:
        return np.zeros(table.count.shape, np.int64)
    if routes is None:
        raise ValueError(f"route {route!r} needs a router, and this run has none (sharding.kind is random)")
    if kind == "sequence":
        return np.repeat(routes.sequence[:, None], chunks, axis=1)
    interval = int(rest)
    return np.repeat(routes.every[interval], interval // chunk_tokens, axis=1)[:, :chunks]


def _oracle(table: LossTable, width: int) -> Int64[np.ndarray, "N C"]:
    """The path with the lowest loss of every `width` chunks together."""
    chunks = table.loss.shape[1]
    starts = np.arange(0, chunks, max(1, width))
    best = np.add.reduceat(table.loss, starts, axis=1).argmin(axis=2)
    return np.repeat(best, np.diff(np.append(starts, chunks)), axis=1)


def _perplexity(loss: float, tokens: int) -> float:
    return math.exp(min(loss / tokens, 700.0)) if tokens else math.nan


def measures(table: LossTable, choice: Int64[np.ndarray, "N C"]) -> dict[str, Any]:
    """Perplexity, bits per byte, perplexity by domain that has tokens, and the share of counted tokens of each path."""
    losses = table.under(choice)
    num_bytes = int(table.text_bytes.sum(dtype=np.int64))
    by_domain = {}
    for index, name in enumerate(table.domain_names):
        rows = table.domains == index
        tokens = int(table.count[rows].sum(dtype=np.int64))
        if tokens:
            by_domain[name] = _perplexity(float(losses[rows].sum()), tokens)
    load = np.bincount(choice.ravel(), table.count.ravel(), minlength=table.num_paths)
    return {
        "perplexity": _perplexity(float(losses.sum()), table.tokens),
        "bits_per_byte": float(losses.sum()) / math.log(2) / num_bytes if num_bytes else math.nan,
        "per_domain": by_domain,
        "path_load": (load / max(1, table.tokens)).tolist(),
    }


def summarise(
    tables: Mapping[str, LossTable],
    mixture: str,
    routes: RouteTable | None,
    wanted: Sequence[str],
    chunk_tokens: int,
) -> dict[str, Any]:
    """The report's numbers: every model but `mixture` by its name, the mixture as `dipaco` by route.

    Keys: perplexity, bits_per_byte {model: x, dipaco: {route: x}}, per_domain {domain: {model: x, dipaco: {route: x}}},
    path_load {route: [share a path]}, tokens, oracle_agreement (share of counted tokens routed as oracle:sequence).
    Routes that need a router are left out where there is none.
    """
    summary: dict[str, Any] = {"perplexity": {}, "bits_per_byte": {}, "per_domain": {}, "path_load": {}}
    for model, table in tables.items():
        summary["tokens"] = table.tokens
        if model != mixture:
            _enter(summary, measures(table, np.zeros(table.count.shape, np.int64)), model)
            continue
        routed = [r for r in wanted if r.startswith("oracle") or routes is not None or table.num_paths == 1]
        for route in routed:
            measured = measures(table, choose(route, table, routes, chunk_tokens))
            _enter(summary, measured, "dipaco", route)
            summary["path_load"][route] = measured["path_load"]
        if routes is not None and table.num_paths > 1:
            summary["oracle_agreement"] = _agreement(table, routes, chunk_tokens)
    return summary


def _enter(summary: dict[str, Any], measured: dict[str, Any], model: str, route: str | None = None) -> None:
    for key in ("perplexity", "bits_per_byte"):
        _put(summary[key], measured[key], model, route)
    for domain, perplexity in measured["per_domain"].items():
        _put(summary["per_domain"].setdefault(domain, {}), perplexity, model, route)


def _put(target: dict[str, Any], value: float, model: str, route: str | None) -> None:
    if route is None:
        target[model] = value
    else:
        target.setdefault(model, {})[route] = value


def _agreement(table: LossTable, routes: RouteTable, chunk_tokens: int) -> float:
    same = choose("sequence", table, routes, chunk_tokens) == choose("oracle:sequence", table, None, chunk_tokens)
    return float((table.count * same).sum() / max(1, table.tokens))
