"""The routes of an evaluation by name: which path predicts each token after the prefix. Torch-free.

sequence         the router's choice after the prefix
every:W          the router's choice, made again every W tokens from the tokens just before
router:W         the router LM's choice (stage router), made again every W tokens from all tokens before
likelihood:W     the router's choice at first, then every W tokens the path that explains the tokens so far best
ensemble:N       the mixture of the N paths with the highest posterior, weighted by how well each explains them
oracle:sequence  the path with the lowest loss of the sequence itself: a bound, as it looks ahead
oracle:every:W   the same for every W tokens
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

FORMS = "sequence, every:W, router:W, likelihood:W, ensemble:N, oracle:sequence, oracle:every:W"
DEFAULT_CHUNK_TOKENS = 32
# What a route that is always one path begins with, where one may be named: path:I.J.
FIXED = "path:"
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


class UnknownRoute(ValueError):
    """A name that is no route, or the name of one that a topology does not offer."""


@dataclass(frozen=True, slots=True)
class Route:
    """A route that was named. `interval` in tokens, None where the path is chosen once; `num_paths` of an ensemble."""

    kind: Literal["sequence", "every", "router", "likelihood", "ensemble", "oracle"]
    interval: int | None = None
    num_paths: int = 1

    @property
    def needs_router(self) -> bool:
        """Whether it asks the router of the features; `router` asks a language model instead."""
        return self.kind not in ("oracle", "router")

    def check(self, num_paths: int) -> None:
        """Raise UnknownRoute where a topology of `num_paths` paths does not offer the route."""
        if self.kind != "ensemble" or 2 <= self.num_paths <= num_paths:
            return
        offered = f"N must be 2..{num_paths}" if num_paths > 1 else "there is nothing to mix"
        paths = f"{num_paths} paths" if num_paths > 1 else "one path"
        raise UnknownRoute(f"route 'ensemble:{self.num_paths}' of a topology of {paths}: {offered}")


def parse_route(name: str) -> Route:
    """The route of a name; raises UnknownRoute."""
    *kind, number = name.split(":")
    match kind, int(number) if _NUMBER.fullmatch(number) else number:
        case [], "sequence":
            return Route("sequence")
        case ["oracle"], "sequence":
            return Route("oracle")
        case ["every"], int(interval):
            return Route("every", interval)
        case ["router"], int(interval):
            return Route("router", interval)
        case ["likelihood"], int(interval):
            return Route("likelihood", interval)
        case ["oracle", "every"], int(interval):
            return Route("oracle", interval)
        case ["ensemble"], int(num_paths):
            return Route("ensemble", num_paths=num_paths)
    raise UnknownRoute(f"route {name!r} is none of {FORMS} (W tokens, N paths)")


def route_name(name: str) -> str:
    """The name itself where it is one; raises UnknownRoute."""
    parse_route(name)
    return name


def router_intervals(names: Iterable[str], kind: Literal["every", "router"] = "every") -> list[int]:
    """The intervals at which the router of the features itself, or the router LM, looks again, ascending."""
    routes = [parse_route(name) for name in names]
    return sorted({route.interval for route in routes if route.kind == kind and route.interval})


def chunk_tokens(names: Iterable[str]) -> int:
    """The grid on which losses are kept: it divides every interval."""
    return math.gcd(*(parse_route(name).interval or 0 for name in names)) or DEFAULT_CHUNK_TOKENS
