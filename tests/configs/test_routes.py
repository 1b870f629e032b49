"""Names of routes: what each says, what is refused, and the grid of tokens that follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import InvalidConfig, parse_config
from configs.routes import Route, UnknownRoute, chunk_tokens, parse_route, router_intervals
from configs.schema import Config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def routed(*routes: object, router: bool = False) -> Config:
    """The quickstart (2 x 2 paths) with these routes, and with a router LM."""
    document: Any = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8"))
    document["experiment"]["evaluation"] = {"routes": list(routes)}
    if router:
        document["experiment"]["stages"].insert(-1, {"kind": "router", "steps": 4, "inner_steps": 2})
    return parse_config(yaml.safe_dump(document), "x.yaml")


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("sequence", Route("sequence")),
        ("every:32", Route("every", 32)),
        ("router:64", Route("router", 64)),
        ("likelihood:16", Route("likelihood", 16)),
        ("ensemble:2", Route("ensemble", num_paths=2)),
        ("oracle:sequence", Route("oracle")),
        ("oracle:every:7", Route("oracle", 7)),
    ],
)
def test_a_name_says_what_is_done(name: str, route: Route) -> None:
    assert parse_route(name) == route
    assert route.needs_router == (not name.startswith(("oracle", "router")))
    assert routed(name, router=True).experiment.evaluation.routes == [name]


WRONG = "best, ,every,every:0,every:-1,every:1.5,every: 2,every:32\n,every:9999999999,oracle:32,oracle:likelihood:3"
WRONG += ",router,router:,router:0,sequence:,sequence:2,likelihood,ensemble:x,path:0.1"


@pytest.mark.parametrize("name", WRONG.split(","))
def test_another_name_is_refused_with_the_ones_that_there_are(name: str) -> None:
    with pytest.raises(UnknownRoute, match=r"is none of sequence, .*likelihood:W, ensemble:N"):
        parse_route(name)
    with pytest.raises(InvalidConfig, match=r"experiment\.evaluation\.routes\[1\]: route '.* is none of sequence"):
        routed("sequence", name)


@pytest.mark.parametrize("num_paths", [1, 5, 100])
def test_an_ensemble_has_two_to_all_paths_of_the_configured_topology(num_paths: int) -> None:
    for fitting in (2, 3, 4):
        routed(f"ensemble:{fitting}")
    with pytest.raises(InvalidConfig, match=rf"'ensemble:{num_paths}' of a topology of 4 paths: N must be 2\.\.4"):
        routed("sequence", f"ensemble:{num_paths}")
    with pytest.raises(UnknownRoute, match="of a topology of one path: there is nothing to mix"):
        parse_route(f"ensemble:{num_paths}").check(1)


def test_a_level_with_a_module_per_path_makes_no_paths_of_its_own() -> None:
    config = (CONFIGS / "path-specific.yaml").read_text(encoding="utf-8")
    assert parse_config(config, "x.yaml").experiment.topology.num_paths == 4


def test_the_grid_divides_all_intervals_and_the_router_looks_at_its_own_alone() -> None:
    routes = ["sequence", "every:48", "likelihood:32", "oracle:every:80", "every:16", "every:48", "ensemble:2"]
    assert chunk_tokens(routes) == 16
    assert router_intervals(routes) == [16, 48]
    assert chunk_tokens(["likelihood:24", "every:36"]) == 12
    assert chunk_tokens(["sequence", "ensemble:2"]) == 32
    assert router_intervals(["likelihood:24", "oracle:every:8"]) == []
    both = ["router:64", "every:16", "router:8"]
    assert (router_intervals(both), router_intervals(both, "router"), chunk_tokens(both)) == ([16], [8, 64], 8)
