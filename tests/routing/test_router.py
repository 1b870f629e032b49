"""A text is routed first on its prefix, then on its last tokens, with the posterior of its features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.schema import ModelConfig
from model.transformer import PathModel
from routing.clusters import Clusters, Group
from routing.features import features_of
from routing.frozen import FrozenRouter
from routing.gater import Gater
from routing.router import FeatureRouter, OnePath, Router, RouteState

PREFIX = 8
CONFIG = ModelConfig(blocks=2, hidden_size=16, heads=2, intermediate_size=24, sequence_length=64)
TEXT = np.array([0, *np.random.default_rng(4).integers(2, 40, 29)], np.uint16)
CENTRES = np.random.default_rng(2).normal(size=(3, 16))


@pytest.fixture(scope="module")
def base() -> PathModel:
    generator = torch.Generator().manual_seed(0)
    model = PathModel(CONFIG, 40).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(
    params=[
        Clusters(np.zeros(16), np.eye(16), (Group(np.arange(16), CENTRES),), 1, PREFIX),
        Gater(np.zeros(16), np.eye(16), CENTRES.T, np.zeros(3), PREFIX),
    ],
    ids=["clusters", "gater"],
)
def frozen(request: pytest.FixtureRequest) -> FrozenRouter:
    router: FrozenRouter = request.param
    return router


def posterior_of(base: PathModel, frozen: FrozenRouter, prefix: list[int]) -> np.ndarray:
    """Of one prefix, BOS first."""
    posterior: np.ndarray = frozen.posterior(features_of(base, [np.array(prefix, np.uint16)]))[0]
    return posterior


def test_a_text_is_routed_first_on_its_prefix_then_on_its_last_tokens(base: PathModel, frozen: FrozenRouter) -> None:
    router: Router = FeatureRouter(base, frozen)
    first, state = router.route(TEXT)
    assert first == pytest.approx(posterior_of(base, frozen, TEXT[: PREFIX + 1].tolist()))
    assert first.sum() == pytest.approx(1.0)
    assert state == RouteState(len(TEXT) - 1)
    later, state = router.route(TEXT[:-2], state)
    assert later == pytest.approx(posterior_of(base, frozen, [0, *TEXT[-PREFIX - 2 : -2].tolist()]))
    assert not np.allclose(first, later)
    assert state == RouteState(len(TEXT) - 3)
    assert (router.num_paths, router.version) == (3, frozen.version)


def test_what_follows_the_first_prefix_does_not_change_the_route(base: PathModel, frozen: FrozenRouter) -> None:
    router = FeatureRouter(base, frozen)
    assert router.route(TEXT)[0] == pytest.approx(router.route(TEXT[: PREFIX + 1])[0])


def test_a_text_shorter_than_the_prefix_is_routed_on_its_first_tokens_once_it_has_them(
    base: PathModel, frozen: FrozenRouter
) -> None:
    router = FeatureRouter(base, frozen)
    short, state = router.route(TEXT[:4])
    assert short == pytest.approx(posterior_of(base, frozen, TEXT[:4].tolist()))
    again, state = router.route(TEXT, state)
    assert again == pytest.approx(router.route(TEXT)[0])
    assert not np.allclose(short, again)
    later, _ = router.route(TEXT, state)
    assert later == pytest.approx(posterior_of(base, frozen, [0, *TEXT[-PREFIX:].tolist()]))


@pytest.mark.parametrize("length", [0, 1, PREFIX - 1])
def test_a_text_that_was_shorter_than_the_prefix_has_not_been_routed_yet(
    base: PathModel, frozen: FrozenRouter, length: int
) -> None:
    router = FeatureRouter(base, frozen)
    assert router.route(TEXT, RouteState(length))[0] == pytest.approx(router.route(TEXT)[0])


def test_a_text_that_was_as_long_as_the_prefix_is_routed_on_its_last_tokens(
    base: PathModel, frozen: FrozenRouter
) -> None:
    found, _ = FeatureRouter(base, frozen).route(TEXT, RouteState(PREFIX))
    assert found == pytest.approx(posterior_of(base, frozen, [0, *TEXT[-PREFIX:].tolist()]))


def test_one_path_is_certain() -> None:
    router: Router = OnePath()
    posterior, state = router.route(np.array([0, 4, 5]))
    assert posterior.tolist() == [1.0]
    assert state == RouteState(2)
    assert router.num_paths == 1
