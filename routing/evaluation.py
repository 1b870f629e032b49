"""The numbers of an evaluation: perplexity, bits per byte, by domain; loads of paths and agreement. Pure numpy.

One table of the losses of all paths answers all routes, the oracles included. The prefix counts for no model (DiPaCo
Sec 2.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.routes import parse_route
from routing.prediction import Prediction, chosen, oracle, predict
from routing.tables import LossTable as LossTable
from routing.tables import RouteTable as RouteTable


def _perplexity(loss: float, tokens: int) -> float:
    return math.exp(min(loss / tokens, 700.0)) if tokens else math.nan


def measures(table: LossTable, prediction: Prediction) -> dict[str, Any]:
    """Perplexity, bits per byte, perplexity by domain that has tokens, and the share of counted tokens of each path."""
    losses = prediction.losses
    num_bytes = int(table.text_bytes.sum(dtype=np.int64))
    by_domain = {}
    for index, name in enumerate(table.domain_names):
        rows = table.domains == index
        tokens = int(table.count[rows].sum(dtype=np.int64))
        if tokens:
            by_domain[name] = _perplexity(float(losses[rows].sum()), tokens)
    return {
        "perplexity": _perplexity(float(losses.sum()), table.tokens),
        "bits_per_byte": float(losses.sum()) / math.log(2) / num_bytes if num_bytes else math.nan,
        "per_domain": by_domain,
        "path_load": prediction.load.tolist(),
    }


def summarise(
    tables: Mapping[str, LossTable],
    mixture: str,
    routes: RouteTable | None,
    wanted: Sequence[str],
    chunk_tokens: int,
    name: str = "dipaco",
    looks: RouteTable | None = None,
) -> dict[str, Any]:
    """The report's numbers: every model but `mixture` by its name, the mixture as `name` by route.

    Keys: perplexity, bits_per_byte {model: x, name: {route: x}}, per_domain {domain: {model: x, name: {route: x}}},
    path_load {route: [share a path]}, tokens, oracle_agreement (share of counted tokens routed as oracle:sequence),
    route_accuracy {route: share of counted tokens routed as the oracle of the same interval} of routes that choose one
    path a chunk. Routes that need a router are left out where there is none; `looks` are those of the router LM.
    Raises what `predict` does.
    """
    summary: dict[str, Any] = {"perplexity": {}, "bits_per_byte": {}, "per_domain": {}, "path_load": {}}
    summary["route_accuracy"] = {}
    for model, table in tables.items():
        summary["tokens"] = table.tokens
        if model != mixture:
            _enter(summary, measures(table, chosen(table, np.zeros(table.count.shape, np.int64))), model)
            continue
        no_router = routes is None and table.num_paths > 1
        routed = [route for route in wanted if not (no_router and parse_route(route).needs_router)]
        for route in routed:
            prediction = predict(route, table, routes, chunk_tokens, looks)
            measured = measures(table, prediction)
            _enter(summary, measured, name, route)
            summary["path_load"][route] = measured["path_load"]
            if prediction.choice is not None and table.num_paths > 1 and parse_route(route).kind != "oracle":
                interval = parse_route(route).interval
                width = interval // chunk_tokens if interval else table.num_chunks
                summary["route_accuracy"][route] = _agreement(table, prediction.choice, width)
        if routes is not None and table.num_paths > 1:
            summary["oracle_agreement"] = _agreement(table, routes.sequence[:, None], table.num_chunks)
    return summary


def beside(summary: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two summaries of one text, of models with other names, as one; loads and agreement are the first one's."""
    merged = {**summary}
    for key in ("perplexity", "bits_per_byte"):
        merged[key] = {**summary[key], **other[key]}
    merged["per_domain"] = {
        domain: {**models, **other["per_domain"].get(domain, {})} for domain, models in summary["per_domain"].items()
    }
    return merged


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


def _agreement(table: LossTable, choice: npt.NDArray[np.int64], width: int) -> float:
    """The share of counted tokens whose path is the best one of their `width` chunks."""
    same = oracle(table, width) == choice
    return float((table.count * same).sum() / max(1, table.tokens))
