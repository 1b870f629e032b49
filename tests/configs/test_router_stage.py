"""The router stage in a configuration: where it may stand, and what it is refused without."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema import Config
from configs.stages import InferenceGaterConfig

LEVELS = [{"modules": 2, "blocks": [0], "embedding": True}, {"modules": 2, "blocks": [1], "head": True}]
MORE = {
    "train": {"phases": 2, "inner_steps": 4},
    "pretrain": {"steps": 2, "inner_steps": 2},
    "router": {"steps": 6, "inner_steps": 3},
}


def config(*kinds: str, router: dict[str, Any] | None = None, **changes: Any) -> Config:
    """A configuration of these stages; keyword arguments change sections of the experiment."""
    stages = [{"kind": kind, **MORE.get(kind, {})} for kind in kinds or USUAL]
    for stage in stages:
        stage.update(router or {} if stage["kind"] == "router" else {})
    experiment: dict[str, Any] = {
        "model": {"blocks": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16, "sequence_length": 64},
        "topology": {"levels": LEVELS},
        "stages": stages,
    }
    return Config.model_validate({"name": "x", "experiment": {**experiment, **changes}})


USUAL = ("pretrain", "shard", "train", "router")


@pytest.mark.parametrize(
    "kinds",
    [
        USUAL,
        (*USUAL, "evaluate"),
        ("pretrain", "shard", "train", "reshard", "train", "router", "evaluate"),
    ],
)
def test_stands_after_the_last_train(kinds: tuple[str, ...]) -> None:
    stage = config(*kinds).experiment.router
    assert stage is not None
    assert (stage.window, stage.max_sequences) == (64, None)


@pytest.mark.parametrize(
    "kinds",
    [
        ("pretrain", "shard", "router"),
        ("pretrain", "router"),
        (*USUAL, "router"),
        ("pretrain", "shard", "train", "router", "reshard", "train"),
        ("pretrain", "shard", "train", "evaluate", "router"),
    ],
)
def test_stands_nowhere_else(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="after the last train one gater and one router"):
        config(*kinds)


def one_path() -> dict[str, Any]:
    return {"levels": [{**level, "modules": 1} for level in LEVELS]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"topology": one_path(), "sharding": {"kind": "random"}}, "a router stage chooses between paths, and this"),
        ({"topology": {"levels": LEVELS, "replicas": 2}}, "a router stage learns .* set topology.replicas to 1"),
        ({"corpus": {"splits": {"router": 0.0}}}, "a router stage scores the router split: set corpus.splits.router"),
        ({"tokenizer": {"vocab_size": 3}}, r"vocab_size \(3\) must be at least the number of paths \(4\)"),
        ({"baselines": [{"name": "router"}]}, "from base, dipaco, dipaco-best, mixture, router"),
        ({"router": {"inner_steps": 4}}, r"router.steps \(6\) must be a multiple of its inner_steps \(4\)"),
        ({"router": {"window": 0}}, "greater than 0"),
        ({"router": {"objective": "lm"}}, "Extra inputs are not permitted"),
    ],
)
def test_is_refused_without_what_it_needs(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config(**changes)


def test_needs_a_base() -> None:
    with pytest.raises(ValidationError, match="a router stage starts from a trained base: add a pretrain stage"):
        config("shard", "train", "router", sharding={"kind": "random"})


def test_a_route_by_the_router_lm_needs_the_stage() -> None:
    routes = {"evaluation": {"routes": ["sequence", "router:32"]}}
    assert config(**routes).experiment.evaluation.routes[1] == "router:32"
    with pytest.raises(ValidationError, match=r"'router:32' needs a router LM: add '- kind: router' after"):
        config("pretrain", "shard", "train", "evaluate", **routes)
    config("pretrain", "evaluate", topology=one_path(), **routes)  # where one path is every route


@pytest.mark.parametrize("more", [{"capacity": 1.25}, {"match_labels": True}])
def test_soft_labels_are_neither_capped_nor_matched(more: dict[str, Any]) -> None:
    gater = {"temperature": 20.0, "capacity": None, "match_labels": False, **more}
    with pytest.raises(ValidationError, match="neither capped nor matched"):
        InferenceGaterConfig.model_validate(gater)
    plain = InferenceGaterConfig()
    assert (plain.capacity, plain.match_labels, plain.temperature) == (None, False, 30.0)
