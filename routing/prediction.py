"""What a route predicts, from the losses of all paths: a loss for every chunk, and the load on every path. Pure numpy.

`sequence`, `every`, `router`, `likelihood` and the oracles choose one path a chunk. `ensemble` mixes paths, and is
still a causal prediction: by the chain rule its chunks' losses sum up to -log sum_k w_k exp(-L_k), L_k the loss of the
sequence under path k. Both of the last two follow from Bayes' rule with the router's posterior after the prefix as
prior.

Legend: N sequences, C chunks of the loss grid, G groups of chunks, P paths, K paths of an ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

from configs.routes import parse_route
from routing.records import MalformedRecord
from routing.tables import LossTable, RouteTable

# A router that rules a path out may be wrong: less than this is taken for this.
SMALLEST_PRIOR = float(np.finfo(np.float32).smallest_normal)


class NoRouter(ValueError):
    """A route needs a router, and the run has none."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Losses (nats) of a route, and the share that each path has in predicting the counted tokens.

    `choice`: the path of each chunk, where one path predicts it.
    """

    losses: Float64[np.ndarray, "N C"]
    load: Float64[np.ndarray, " P"]
    choice: Int64[np.ndarray, "N C"] | None = None


def predict(
    name: str, table: LossTable, routes: RouteTable | None, chunk_tokens: int, looks: RouteTable | None = None
) -> Prediction:
    """The prediction of a route; a topology of one path needs no router. `looks`: what the router LM chose.

    Raises UnknownRoute, NoRouter, and MalformedRecord where the router knows other paths than the table.
    """
    route = parse_route(name)
    route.check(table.num_paths)
    if table.num_paths == 1:
        return chosen(table, np.zeros(table.count.shape, np.int64))
    width = route.interval // chunk_tokens if route.interval else table.num_chunks
    if route.kind == "oracle":
        return chosen(table, oracle(table, width))
    groups = _Groups.of(table.num_chunks, width)
    if route.kind == "router":
        if looks is None:
            raise NoRouter(f"route {name!r} needs a router LM, and this run has none (stages has no router)")
        assert route.interval is not None
        return chosen(table, groups.spread(_fitting(looks, table).every[route.interval]))
    if routes is None:
        raise NoRouter(f"route {name!r} needs a router, and this run has none (sharding.kind is random)")
    routes = _fitting(routes, table)
    match route.kind:
        case "sequence":
            return chosen(table, groups.spread(routes.sequence[:, None]))
        case "every":
            assert route.interval is not None
            return chosen(table, groups.spread(routes.every[route.interval]))
        case "likelihood":
            return chosen(table, groups.spread(_likeliest(table, routes, groups)))
        case "ensemble":
            return _mixed(table, routes, route.num_paths)


def _fitting(routes: RouteTable, table: LossTable) -> RouteTable:
    """The routes themselves; raises MalformedRecord where they are over other paths than the table."""
    if routes.num_paths != table.num_paths:
        raise MalformedRecord(f"the router chose between {routes.num_paths} paths, the mixture has {table.num_paths}")
    return routes


@dataclass(frozen=True, slots=True)
class _Groups:
    """Consecutive chunks for which a path is chosen together."""

    starts: Int64[np.ndarray, " G"]
    of_chunk: Int64[np.ndarray, " C"]

    @classmethod
    def of(cls, num_chunks: int, width: int) -> _Groups:
        width = max(1, width)
        return cls(np.arange(0, num_chunks, width), np.arange(num_chunks) // width)

    def spread(self, choice: Int64[np.ndarray, "N G"]) -> Int64[np.ndarray, "N C"]:
        """Each group's path for all of its chunks."""
        return np.take(choice, self.of_chunk, axis=1)


def chosen(table: LossTable, choice: Int64[np.ndarray, "N C"]) -> Prediction:
    """One path a chunk; its load is its share of the counted tokens."""
    load = np.bincount(choice.ravel(), table.count.ravel(), minlength=table.num_paths)
    return Prediction(table.under(choice), load / max(1, table.tokens), choice)


def oracle(table: LossTable, width: int) -> Int64[np.ndarray, "N C"]:
    """The path with the lowest loss of every `width` chunks together."""
    groups = _Groups.of(table.num_chunks, width)
    return groups.spread(np.add.reduceat(table.loss, groups.starts, axis=1).argmin(axis=2))


def _likeliest(table: LossTable, routes: RouteTable, groups: _Groups) -> Int64[np.ndarray, "N G"]:
    """The path with the lowest -log prior + loss of all chunks before the group; in the first, the router's choice."""
    before = np.zeros_like(table.loss)
    np.cumsum(table.loss[:, :-1], axis=1, out=before[:, 1:])
    choice: npt.NDArray[np.int64] = (before[:, groups.starts] - _log_prior(routes)[:, None]).argmin(axis=2)
    choice[:, :1] = routes.sequence[:, None]
    return choice


def _mixed(table: LossTable, routes: RouteTable, num_paths: int) -> Prediction:
    """The Bayes mixture of the paths with the highest prior, renormalised (ties: the lower index).

    Its load is the mean over counted tokens of the weights after the whole sequence: who has explained it.
    """
    log_prior = _log_prior(routes)
    members = np.argsort(-log_prior, axis=1, kind="stable")[:, :num_paths]  # (N, K)
    losses = np.take_along_axis(table.loss, members[:, None, :], axis=2)  # (N, C, K)
    so_far = np.cumsum(np.pad(losses, ((0, 0), (1, 0), (0, 0))), axis=1)  # (N, C + 1, K), from before the first chunk
    evidence = np.take_along_axis(log_prior, members, axis=1)[:, None] - so_far  # log w_k - L_k, up to a constant
    mixed = np.logaddexp.reduce(evidence, axis=2)  # (N, C + 1)
    after = np.exp(evidence[:, -1] - mixed[:, -1:])  # (N, K)
    tokens = table.count.sum(axis=1, dtype=np.int64)
    load = np.bincount(members.ravel(), (after * tokens[:, None]).ravel(), minlength=table.num_paths)
    return Prediction(-np.diff(mixed, axis=1), load / max(1, table.tokens))


def _log_prior(routes: RouteTable) -> Float64[np.ndarray, "N P"]:
    log_prior: npt.NDArray[np.float64] = np.log(np.maximum(routes.posterior.astype(np.float64), SMALLEST_PRIOR))
    return log_prior
