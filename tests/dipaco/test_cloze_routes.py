"""What routes choose by the end of a context, from tables made by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from configs.routes import UnknownRoute
from configs.schema import LevelConfig, TopologyConfig
from dipaco.cloze_routes import Chooser, Chosen, Grid, check, depends_on_the_context_alone, intervals_of
from dipaco.ending import Refused
from model.topology import Topology, UnknownPath
from routing.tables import RouteTable

GRID = Grid(context_tokens=64, prefix_tokens=32, chunk_tokens=16)
# Two items, two chunks of context, three paths.
LOSSES = np.array([[[5.0, 4.0, 9.0], [1.0, 6.0, 0.0]], [[3.0, 2.0, 8.0], [3.0, 3.5, 1.0]]])
POSTERIOR = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], np.float32)


def topology(paths: int) -> Topology:
    level = LevelConfig(modules=paths, blocks=[0, 1], embedding=True, head=True)
    return Topology.from_config(TopologyConfig(levels=[level]))


def table() -> RouteTable:
    every = {16: np.array([[0, 1, 2, 0], [2, 0, 1, 2]]), 32: np.array([[0, 1], [2, 0]]), 64: np.array([[0], [2]])}
    return RouteTable(np.array([0, 2]), POSTERIOR, every)


class Asked:
    """Gives losses of contexts, and only of those that were asked for."""

    def __init__(self) -> None:
        self.pairs = 0

    def __call__(self, needed: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        self.pairs += int(needed.sum())
        return np.where(needed[:, None], LOSSES, np.nan)


def choose(name: str, asked: Asked | None = None, paths: int = 3, router: bool = True) -> Chosen:
    routes = table() if router else None
    return Chooser(topology(paths), GRID, 2, routes, routes, asked or Asked()).choose(name)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("sequence", [0, 2]),
        ("every:16", [2, 1]),
        ("every:32", [1, 0]),
        ("every:64", [0, 2]),
        ("router:16", [2, 1]),
        ("oracle:sequence", [0, 1]),
        ("likelihood:64", [0, 2]),
        ("path:1", [1, 1]),
    ],
)
def test_one_path_is_chosen_by_the_last_look(name: str, paths: list[int]) -> None:
    chosen = choose(name)
    assert chosen.paths.tolist() == [[path] for path in paths]
    assert not chosen.log_weights.any()


def test_the_likeliest_path_has_the_lowest_loss_and_a_prior() -> None:
    """-log posterior + losses of both chunks: 6.69, 11.2, 10.6 and 7.61, 7.11, 9.51."""
    assert choose("likelihood:16").paths.tolist() == [[0], [1]]
    assert choose("likelihood:32").paths.tolist() == [[0], [1]]


def test_likelihood_reads_no_further_than_its_last_look() -> None:
    """A grid of 16 with looks every 32 in a context of 48 after the prefix: the third chunk comes after the look."""
    losses = np.array([[[0.0, 1.0, 9.0], [0.0, 1.0, 9.0], [99.0, 1.0, 0.0]]])
    routes = RouteTable(np.array([2]), np.full((1, 3), 1 / 3, np.float32), {})
    chooser = Chooser(topology(3), Grid(80, 32, 16), 1, routes, None, lambda needed: losses)
    assert chooser.choose("likelihood:32").paths.tolist() == [[0]]
    assert chooser.choose("likelihood:16").paths.tolist() == [[1]]


def test_an_ensemble_is_weighted_by_prior_and_likelihood_of_the_context() -> None:
    asked = Asked()
    chosen = choose("ensemble:2", asked)
    assert chosen.paths.tolist() == [[0, 1], [2, 0]]
    assert asked.pairs == 4, "no other path reads the context"
    weights = np.array([[0.5 * np.exp(-6), 0.3 * np.exp(-10)], [0.6 * np.exp(-9), 0.2 * np.exp(-6)]])
    assert np.exp(chosen.log_weights) == pytest.approx(weights / weights.sum(axis=1, keepdims=True), rel=1e-6)


@pytest.mark.parametrize("name", ["sequence", "every:32", "router:16", "oracle:sequence", "likelihood:16"])
def test_of_one_path_nothing_is_asked(name: str) -> None:
    asked = Asked()
    assert choose(name, asked, paths=1, router=False).paths.tolist() == [[0], [0]]
    assert asked.pairs == 0


@pytest.mark.parametrize("name", ["sequence", "every:32", "likelihood:16", "ensemble:2", "router:16"])
def test_a_route_without_its_router_is_refused(name: str) -> None:
    with pytest.raises(Refused, match=f"route '{name}' needs a router, which this run has not"):
        choose(name, router=False)


def test_oracles_that_see_the_ending_are_refused() -> None:
    assert depends_on_the_context_alone("oracle:sequence")
    assert depends_on_the_context_alone("path:0.1")
    assert not depends_on_the_context_alone("oracle:every:32")
    with pytest.raises(Refused, match="route 'oracle:every:32' looks at the ending that is to be found"):
        check("oracle:every:32", topology(3))
    with pytest.raises(UnknownRoute, match="N must be 2"):
        check("ensemble:4", topology(3))
    with pytest.raises(UnknownPath):
        check("path:3", topology(3))
    check("path:2", topology(3))


def test_intervals_by_kind() -> None:
    assert intervals_of(["every:32", "path:0", "every:16", "router:8", "sequence"], "every") == [16, 32]
