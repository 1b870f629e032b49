"""Posteriors, distances and paths of a frozen gater, against sums written out here, and what is refused as one."""

from __future__ import annotations

import math

import msgpack
import numpy as np
import pytest

from routing.gater import Gater
from routing.records import MalformedRecord

NOISE = np.random.default_rng(0)


def some_gater(prefix_tokens: int = 32) -> Gater:
    return Gater(
        NOISE.normal(size=40),
        NOISE.normal(size=(40, 7)),
        NOISE.normal(size=(7, 3)),
        NOISE.normal(size=3),
        prefix_tokens,
    )


def test_logits_and_posteriors_are_those_of_logistic_regression() -> None:
    gater = some_gater()
    z = NOISE.normal(size=(6, 40)).astype(np.float32)
    logits, posterior = gater.logits(z), gater.posterior(z)
    for row, features in enumerate(z):
        x = (features.astype(np.float64) - gater.mean) @ gater.matrix
        expected = [float(x @ gater.weights[:, path] + gater.bias[path]) for path in range(3)]
        assert logits[row] == pytest.approx(expected)
        powers = [math.exp(logit - max(expected)) for logit in expected]
        assert posterior[row] == pytest.approx([power / sum(powers) for power in powers])
    assert (gater.num_shards, gater.num_paths, gater.replicas) == (3, 3, 1)


def test_distances_are_minus_the_log_posterior_and_come_in_order() -> None:
    gater = some_gater()
    z = NOISE.normal(scale=0.1, size=(20, 40))
    shards, distances = gater.nearest(z, 2)
    posterior = gater.posterior(z)
    assert shards.shape == distances.shape == (20, 2)
    assert np.take_along_axis(posterior, shards, axis=1) == pytest.approx(np.exp(-distances))
    assert (distances[:, 0] <= distances[:, 1]).all()
    assert gater.paths(z).tolist() == shards[:, 0].tolist() == posterior.argmax(axis=1).tolist()


def test_ties_go_to_the_lower_index() -> None:
    alike = Gater(np.zeros(1), np.eye(1), np.tile([[0.0, 1.0]], 50), np.zeros(100), 32)
    shards, distances = alike.nearest(np.ones((1, 1)), 100)
    assert shards[0].tolist() == [*range(1, 100, 2), *range(0, 100, 2)]
    assert alike.paths(np.ones((1, 1))).tolist() == [1]
    assert distances[0, :50] == pytest.approx(np.full(50, distances[0, 0]))


def test_far_features_have_a_posterior_and_distances_that_are_finite() -> None:
    gater = some_gater()
    z = np.full((1, 40), 1e6)
    assert gater.posterior(z).sum() == pytest.approx(1.0)
    distances = gater.nearest(z, 3)[1]
    assert np.isfinite(distances).all()
    assert distances[0, 2] > 1e4


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    gater = some_gater()
    z = NOISE.normal(size=(200, 40)).astype(np.float32)
    for together, alone in (
        (gater.logits(z), [gater.logits(row[None]) for row in z]),
        (gater.posterior(z), [gater.posterior(row[None]) for row in z]),
        (gater.nearest(z, 3)[1], [gater.nearest(row[None], 3)[1] for row in z]),
    ):
        assert np.array_equal(together, np.concatenate(alone))


def test_the_frozen_form_returns_and_names_the_version() -> None:
    gater = some_gater(prefix_tokens=16)
    again = Gater.from_bytes(gater.to_bytes())
    z = NOISE.normal(size=(20, 40))
    assert again.prefix_tokens == 16
    assert np.array_equal(again.logits(z), gater.logits(z))
    assert again.to_bytes() == gater.to_bytes()
    assert again.version == gater.version
    moved = Gater(gater.mean, gater.matrix, gater.weights, gater.bias + 1e-9, 16)
    assert moved.version != gater.version


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "clusters"},
        {"kind": ["gater"]},
        {"mean": b"odd"},
        {"mean": b""},
        {"mean": "text"},
        {"matrix": b""},
        {"matrix": np.ones(41).tobytes()},
        {"weights": np.ones(20).tobytes()},
        {"weights": np.full(21, np.inf).tobytes()},
        {"bias": np.full(3, np.nan).tobytes()},
        {"bias": b""},
        {"bias": 3},
        {"prefix_tokens": "two"},
        {"prefix_tokens": 0},
        {"prefix_tokens": True},
        {"prefix_tokens": 2.5},
    ],
)
def test_a_gater_that_is_something_else_is_refused(change: dict[str, object]) -> None:
    record = msgpack.unpackb(some_gater().to_bytes()) | change
    with pytest.raises(MalformedRecord):
        Gater.from_bytes(msgpack.packb(record))


@pytest.mark.parametrize("key", ["kind", "mean", "matrix", "weights", "bias", "prefix_tokens"])
def test_a_gater_without_one_of_its_parts_is_refused(key: str) -> None:
    record = msgpack.unpackb(some_gater().to_bytes())
    del record[key]
    with pytest.raises(MalformedRecord, match=key):
        Gater.from_bytes(msgpack.packb(record))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", msgpack.packb(3), msgpack.packb([1]), some_gater().to_bytes()[:-9], b"\x91" * 5000]
)
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        Gater.from_bytes(data)
