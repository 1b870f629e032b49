"""Several paths at once: the mixture that evaluation's `ensemble:N` measures, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference.engine import Request
from inference.ensemble import Ensemble
from inference.sampling import Sampling
from routing.evaluation import LossTable, RouteTable
from routing.prediction import predict
from routing.router import RouteState
from tests.inference.conftest import Mixture

PREFIX_TOKENS = 8
POSTERIOR = np.array([0.1, 0.5, 0.15, 0.25])
PROMPT = [5, 9, 11, 30, 7, 7, 2, 19, 22, 14, 6, 33]


class Fixed:
    """A router that always says the same; remembers how much it saw."""

    version, num_paths = "fixed", 4

    def __init__(self) -> None:
        self.looks: list[int] = []

    def route(self, tokens: np.ndarray, state: RouteState | None = None) -> tuple[np.ndarray, RouteState]:
        self.looks.append(len(tokens) - 1)
        return POSTERIOR, RouteState(len(tokens) - 1)


@torch.no_grad()
def log_probabilities(mixture: Mixture, path_index: int, stream: list[int]) -> np.ndarray:
    """(T, V): of the token after each of the stream's, by one plain forward pass."""
    path = mixture.paths.setdefault(path_index, mixture.path(path_index))
    scores: np.ndarray = path.logits(path(torch.tensor([stream]))[0]).double().log_softmax(dim=-1).numpy()
    return scores


def mixed(mixture: Mixture, members: list[int], stream: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(log of the mixture's next-token probabilities, log weights) by full forward passes under every member."""
    scores, weights = [], []
    for member in members:
        table = log_probabilities(mixture, member, stream)
        explained = sum(table[place - 1, stream[place]] for place in range(PREFIX_TOKENS + 1, len(stream)))
        weights.append(np.log(POSTERIOR[member]) + explained)
        scores.append(weights[-1] + table[-1])
    return np.logaddexp.reduce(scores, axis=0) - np.logaddexp.reduce(weights), np.array(weights)


def ensemble(mixture: Mixture, num_paths: int = 2) -> Ensemble:
    return Ensemble(mixture.source(), Fixed(), PREFIX_TOKENS, bos_id=0, eos_id=39, num_paths=num_paths)


@pytest.mark.parametrize("num_paths", [2, 3])
def test_each_token_is_the_likeliest_of_the_mixture(mixture: Mixture, num_paths: int) -> None:
    members = [1, 3, 2][:num_paths]
    stream = [0, *PROMPT]
    for written in ensemble(mixture, num_paths).generate(Request(PROMPT, 5, Sampling(0.0))):
        scores, weights = mixed(mixture, members, stream)
        assert written.token == int(np.argmax(scores))
        assert written.path_index == members[int(np.argmax(weights))]
        stream.append(written.token)


def test_it_is_what_evaluation_measures(mixture: Mixture) -> None:
    """The losses of a text under the mixture, token by token, sum up to those of the route `ensemble:2`."""
    stream = [0, *PROMPT, 4, 18, 3, 25]
    counted = range(PREFIX_TOKENS + 1, len(stream))
    tables = [log_probabilities(mixture, path, stream) for path in range(4)]
    losses = [[-float(table[place - 1, stream[place]]) for table in tables] for place in counted]
    by_token = sum(-float(mixed(mixture, [1, 3], stream[:place])[0][stream[place]]) for place in counted)
    table = LossTable(
        loss=np.array([losses]),
        count=np.ones((1, len(losses)), np.uint32),
        text_bytes=np.ones((1, len(losses)), np.uint32),
        domains=np.zeros(1, np.int64),
        domain_names=("any",),
    )
    routes = RouteTable(np.array([1]), POSTERIOR[None].astype(np.float32), {})
    prediction = predict("ensemble:2", table, routes, chunk_tokens=1)
    assert by_token == pytest.approx(float(prediction.losses.sum()), rel=1e-5)


def test_a_short_prompt_is_routed_again_when_its_prefix_is_whole(mixture: Mixture) -> None:
    engine = ensemble(mixture)
    tokens = [each.token for each in engine.generate(Request(PROMPT[:3], 12, Sampling(0.0)))]
    assert engine._router.looks == [3, PREFIX_TOKENS]  # type: ignore[attr-defined]
    again = [each.token for each in engine.generate(Request([*PROMPT[:3], *tokens[:5]], 7, Sampling(0.0)))]
    assert again == tokens[5:]


def test_a_text_slides_past_a_sequence(mixture: Mixture) -> None:
    engine = ensemble(mixture)
    written = list(engine.generate(Request(PROMPT * 5, 10, Sampling(0.9, seed=2))))
    assert written[-1].finish in ("stop", "length")
    long = list(engine.generate(Request(PROMPT * 8, 3, Sampling(0.0))))
    assert len(long) == 3
