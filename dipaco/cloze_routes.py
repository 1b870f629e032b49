"""What a route has chosen by the end of a context: the same for whatever ending follows. Pure numpy, torch-free.

every:W, router:W and likelihood:W stand by their last look at the context, which they take every W tokens from the
prefix on. ensemble:N weights its paths by how well each explains the context. oracle:sequence is the path that explains
the context best: it needs no router, and sees no ending, as that would favour the true one.

Legend: n items, C chunks of the context after the prefix, P paths, K paths of a route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from configs.routes import FIXED, parse_route
from dipaco.ending import Refused
from model.topology import Topology
from routing.prediction import SMALLEST_PRIOR
from routing.tables import RouteTable

FORMS = "sequence, every:W, router:W, likelihood:W, ensemble:N, oracle:sequence, path:I.J"

# Losses (nats) of contexts by chunk, where they are asked for; elsewhere whatever.
ContextLosses = Callable[[Bool[np.ndarray, "n P"]], Float64[np.ndarray, "n C P"]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The paths of every item, and the logarithms of their weights: a path alone has 0."""

    paths: Int64[np.ndarray, "n K"]
    log_weights: Float64[np.ndarray, "n K"]

    @classmethod
    def alone(cls, paths: Int64[np.ndarray, " n"]) -> Chosen:
        return cls(paths[:, None], np.zeros((len(paths), 1)))


@dataclass(frozen=True, slots=True)
class Grid:
    """Context and prefix (tokens), and the chunks in which losses of the context are kept."""

    context_tokens: int
    prefix_tokens: int
    chunk_tokens: int

    @property
    def after_prefix(self) -> int:
        return self.context_tokens - self.prefix_tokens

    @property
    def num_chunks(self) -> int:
        return self.after_prefix // self.chunk_tokens

    def last_look(self, interval: int) -> int:
        """How many intervals after the prefix the last look at the context is taken."""
        return self.after_prefix // interval


def depends_on_the_context_alone(name: str) -> bool:
    """Whether a route can answer before it has seen how the text goes on."""
    return name.startswith(FIXED) or name == "oracle:sequence" or parse_route(name).kind != "oracle"


def check(name: str, topology: Topology) -> None:
    """Raises Refused, UnknownRoute or UnknownPath where a route has no meaning here."""
    if name.startswith(FIXED):
        topology.path_index(name.removeprefix(FIXED))
        return
    parse_route(name).check(topology.num_paths)
    if not depends_on_the_context_alone(name):
        raise Refused(f"route {name!r} looks at the ending that is to be found; a cloze offers {FORMS}")


def intervals_of(names: Iterable[str], kind: str) -> list[int]:
    """The intervals (tokens) of the routes of a kind, ascending."""
    routes = [parse_route(name) for name in names if not name.startswith(FIXED)]
    return sorted({route.interval for route in routes if route.kind == kind and route.interval})


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses for n items, by what the routers say of their contexts. `looks`: what the router LM chose."""

    topology: Topology
    grid: Grid
    num_items: int
    routes: RouteTable | None
    looks: RouteTable | None
    context_losses: ContextLosses

    def choose(self, name: str) -> Chosen:
        """The paths of every item under a route that was checked; raises Refused where a router is missing."""
        if name.startswith(FIXED):
            return self._always(self.topology.path_index(name.removeprefix(FIXED)))
        if self.topology.num_paths == 1:
            return self._always(0)
        route = parse_route(name)
        if route.kind == "oracle":
            return Chosen.alone(self._losses_of_all().sum(axis=1).argmin(axis=1))
        if route.kind == "router":
            return self._look(self.looks, name, route.interval)
        if self.routes is None:
            raise _no_router(name)
        match route.kind:
            case "every":
                return self._look(self.routes, name, route.interval)
            case "likelihood":
                assert route.interval is not None
                return self._likeliest(self.routes, route.interval)
            case "ensemble":
                return self._mixture(self.routes, route.num_paths)
        return Chosen.alone(self.routes.sequence)

    def _always(self, path_index: int) -> Chosen:
        return Chosen.alone(np.full(self.num_items, path_index, np.int64))

    def _look(self, table: RouteTable | None, name: str, interval: int | None) -> Chosen:
        if table is None:
            raise _no_router(name)
        assert interval is not None
        return Chosen.alone(table.every[interval][:, self.grid.last_look(interval)])

    def _losses_of_all(self) -> Float64[np.ndarray, "n C P"]:
        return self.context_losses(np.ones((self.num_items, self.topology.num_paths), bool))

    def _likeliest(self, routes: RouteTable, interval: int) -> Chosen:
        """The lowest -log prior + loss up to the last look; at the look after the prefix the router's own choice."""
        if self.grid.last_look(interval) == 0:
            return Chosen.alone(routes.sequence)
        chunks = self.grid.last_look(interval) * interval // self.grid.chunk_tokens
        return Chosen.alone((self._losses_of_all()[:, :chunks].sum(axis=1) - _log_prior(routes)).argmin(axis=1))

    def _mixture(self, routes: RouteTable, num_paths: int) -> Chosen:
        """The paths with the highest prior (ties: the lower index), each by prior times likelihood of the context."""
        log_prior = _log_prior(routes)
        members = np.argsort(-log_prior, axis=1, kind="stable")[:, :num_paths]  # (n, K)
        needed = np.zeros(log_prior.shape, bool)
        np.put_along_axis(needed, members, True, axis=1)
        losses = np.take_along_axis(self.context_losses(needed).sum(axis=1), members, axis=1)  # (n, K)
        evidence = np.take_along_axis(log_prior, members, axis=1) - losses
        return Chosen(members, evidence - np.logaddexp.reduce(evidence, axis=1, keepdims=True))


def _log_prior(routes: RouteTable) -> Float64[np.ndarray, "n P"]:
    log_prior: np.ndarray = np.log(np.maximum(routes.posterior.astype(np.float64), SMALLEST_PRIOR))
    return log_prior


def _no_router(name: str) -> Refused:
    return Refused(f"route {name!r} needs a router, which this run has not; take oracle:sequence or {FIXED}I.J")
