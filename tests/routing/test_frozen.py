"""Clusters and a gater stand where the other does, and bytes that are neither are refused once and clearly."""

from __future__ import annotations

import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.clusters import Clusters, Group
from routing.frozen import FrozenRouter, read_router
from routing.gater import Gater
from routing.records import MalformedRecord

NOISE = np.random.default_rng(1)
CLUSTERS = Clusters(np.zeros(4), np.eye(4), (Group(np.arange(4), NOISE.normal(size=(6, 4))),), 2, 24)
GATER = Gater(np.zeros(4), np.eye(4), NOISE.normal(size=(4, 3)), NOISE.normal(size=3), 24)


@pytest.mark.parametrize("router", [CLUSTERS, GATER])
def test_a_frozen_router_is_read_as_what_it_is_and_offers_the_same(router: FrozenRouter) -> None:
    again = read_router(router.to_bytes())
    assert type(again) is type(router)
    assert again.version == router.version
    assert (again.prefix_tokens, again.num_paths) == (24, 3)
    assert again.num_shards == again.num_paths * again.replicas
    z = NOISE.normal(size=(50, 4)).astype(np.float32)
    shards, distances = again.nearest(z, 2)
    assert np.array_equal(distances, np.sort(again.distances(z), axis=1)[:, :2])
    assert np.array_equal(again.paths(z), shards[:, 0] // again.replicas)
    posterior = again.posterior(z)
    assert posterior.shape == (50, 3)
    assert posterior.sum(axis=1) == pytest.approx(np.ones(50))


@pytest.mark.parametrize("kind", ["forest", 3, None, ["gater"]])
def test_a_router_of_another_kind_is_refused_with_the_kinds_that_are_read(kind: object) -> None:
    with pytest.raises(MalformedRecord, match="'clusters' and 'gater'"):
        read_router(msgpack.packb({"kind": kind}))


@pytest.mark.parametrize("record", [{}, [1], 3, "clusters"])
def test_records_without_a_kind_are_no_router(record: object) -> None:
    with pytest.raises(MalformedRecord, match="not a router"):
        read_router(msgpack.packb(record))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200) | st.sampled_from([CLUSTERS.to_bytes()[:40], GATER.to_bytes()[:-3], b"\x91" * 5000]))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        read_router(data)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([CLUSTERS.to_bytes(), GATER.to_bytes()]), st.data())
def test_bytes_with_a_fault_are_a_router_or_refused(whole: bytes, data: st.DataObject) -> None:
    faulty = bytearray(whole)
    faulty[data.draw(st.integers(0, 60))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedRecord):
        assert read_router(bytes(faulty)).num_shards >= 1
