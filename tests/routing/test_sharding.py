"""Every sequence lies in as many shards as it should, none above the capacity, and small shards name the knobs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ShardingConfig
from routing.records import Assignments, ShardManifest
from routing.sharding import UnusableShards, check_sizes, divide, manifests, merge, random_shards


def ranked(count: int, num_shards: int, top_n: int, seed: int = 0) -> Assignments:
    """Assignments of random distances that favour the first shards."""
    distances = np.random.default_rng(seed).exponential(size=(count, num_shards)) * np.geomspace(1, 20, num_shards)
    order = np.argsort(distances, axis=1)[:, :top_n]
    ids = np.arange(count, dtype=np.uint64) * 3 + 1
    nearest = np.take_along_axis(distances, order, axis=1)
    return Assignments(ids, order.astype(np.uint32), nearest.astype(np.float32))


def test_without_a_capacity_every_sequence_is_in_its_nearest_shard() -> None:
    assignments = ranked(50, 4, 1)
    shards = divide(assignments, 4, ShardingConfig())
    for shard, members in enumerate(shards):
        assert members.tolist() == assignments.ids[assignments.shards[:, 0] == shard].tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 60), st.floats(1.0, 2.0), st.integers(0, 999), st.data())
def test_every_sequence_is_in_overlap_different_shards(
    num_shards: int, more: int, capacity: float, seed: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, num_shards))
    assignments = ranked(num_shards + more, num_shards, num_shards, seed)
    shards = divide(assignments, num_shards, ShardingConfig(capacity=capacity, overlap=overlap))
    ids, counts = np.unique(np.concatenate(shards), return_counts=True)
    assert ids.tolist() == assignments.ids.tolist()
    assert set(counts.tolist()) == {overlap}
    for members in shards:
        assert members.tolist() == sorted(set(members.tolist()))
    if overlap == 1:
        assert max(map(len, shards)) <= math.ceil(capacity * len(ids) / num_shards)
        assert min(map(len, shards)) >= 1


def test_overlap_takes_the_nearest_shards() -> None:
    assignments = ranked(30, 5, 2)
    shards = divide(assignments, 5, ShardingConfig(overlap=2))
    for row, choices in enumerate(assignments.shards):
        holding = {shard for shard, members in enumerate(shards) if assignments.ids[row] in members}
        assert holding == set(choices.tolist())


def test_merged_assignments_do_not_depend_on_the_order_of_the_ranges() -> None:
    whole = ranked(20, 3, 3)
    parts = [
        Assignments(whole.ids[part], whole.shards[part], whole.distances[part]) for part in np.array_split(range(20), 3)
    ]
    assert merge(parts[::-1]).to_bytes() == merge(parts).to_bytes() == whole.to_bytes()


def test_random_shards_are_equal_parts_by_seed() -> None:
    ids = np.arange(103, dtype=np.uint64)
    shards = random_shards(ids, 4, 7)
    assert sorted(map(len, shards)) == [25, 26, 26, 26]
    assert np.array_equal(np.sort(np.concatenate(shards)), ids)
    assert all((np.diff(members.astype(np.int64)) > 0).all() for members in shards)
    again = random_shards(ids[::-1].copy(), 4, 7)
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))
    assert not np.array_equal(shards[0], random_shards(ids, 4, 8)[0])


def test_sizes_count_the_tokens_of_every_shard() -> None:
    ids, lengths = np.array([2, 5, 8], np.uint64), np.array([10, 20, 40], np.uint32)
    assert check_sizes([np.array([2, 8], np.uint64), np.array([5], np.uint64)], ids, lengths, 20) == [50, 20]


def test_a_shard_below_a_batch_is_refused_with_the_knobs() -> None:
    ids, lengths = np.array([2, 5, 8], np.uint64), np.array([10, 20, 40], np.uint32)
    shards = [np.array([5, 8], np.uint64), np.array([2], np.uint64), np.array([], np.uint64)]
    with pytest.raises(UnusableShards, match=r"1 \(1 sequences, 10 tokens\), 2 \(0 sequences, 0 tokens\)") as raised:
        check_sizes(shards, ids, lengths, 11)
    for knob in ("sharding.capacity", "sharding.kind", "inner.batch_rows", "paths"):
        assert knob in str(raised.value)


def test_manifests_name_their_shard_and_router() -> None:
    found = manifests([np.array([4], np.uint64), np.array([1, 2], np.uint64)], "ab", 2)
    assert [(m.shard, m.router, m.overlap, m.ids.tolist()) for m in found] == [(0, "ab", 2, [4]), (1, "ab", 2, [1, 2])]
    assert ShardManifest.from_bytes(found[1].to_bytes()).ids.tolist() == [1, 2]
