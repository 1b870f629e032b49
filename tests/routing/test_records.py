"""Records return as they were written, and anything else is refused with one exception."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.records import (
    Assignments,
    Features,
    Losses,
    MalformedRecord,
    Routes,
    ShardManifest,
    evaluated_positions,
)

IDS = np.array([3, 9, 1 << 40], np.uint64)
RECORDS: dict[str, Any] = {
    "features": Features(IDS, np.arange(6, dtype=np.float32).reshape(3, 2)),
    "assignments": Assignments(IDS, np.array([[1, 0]] * 3, np.uint32), np.array([[0.5, 2.0]] * 3, np.float32)),
    "manifest": ShardManifest(2, "ab" * 32, IDS, 2),
    "routes": Routes(
        np.array([0, 4, 5], np.uint32),
        np.array([1, 0, 3], np.uint16),
        np.array([[0, 1, 0, 0], [0.5, 0.25, 0.25, 0], [0.125, 0.125, 0.25, 0.5]], np.float32),
        {32: np.zeros((3, 7), np.uint16), 64: np.ones((3, 4), np.uint16)},
    ),
    "losses": Losses(
        np.array([0, 4, 5], np.uint32),
        np.linspace(0, 1, 6).reshape(3, 2),
        np.array([[32, 32], [32, 4], [31, 0]], np.uint32),
        np.array([[90, 80], [70, 9], [50, 0]], np.uint32),
        np.array([0, 1, 0], np.uint16),
        ("code", "prose"),
    ),
}
FIELDS = sorted((name, key) for name, record in RECORDS.items() for key in msgpack.unpackb(record.to_bytes()))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_returns_as_it_was(name: str) -> None:
    record = RECORDS[name]
    again = type(record).from_bytes(record.to_bytes())
    for field in record.__slots__:
        before, after = getattr(record, field), getattr(again, field)
        if isinstance(before, dict):
            assert before.keys() == after.keys()
            assert all(np.array_equal(before[key], after[key]) for key in before)
        else:
            assert np.array_equal(before, after)
            assert getattr(before, "dtype", None) == getattr(after, "dtype", None)
    assert again.to_bytes() == record.to_bytes()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_tables_of_any_size_return_as_they_were(rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 2**64, rows, np.uint64)
    real = generator.normal(size=(rows, columns)) * 10.0 ** generator.integers(-30, 30)
    whole = generator.integers(0, 2**32, (rows, columns), np.uint32)
    features = Features.from_bytes(Features(ids, real.astype(np.float32)).to_bytes())
    assert np.array_equal(features.ids, ids)
    assert np.array_equal(features.z, real.astype(np.float32))
    assigned = Assignments.from_bytes(Assignments(ids, whole, real.astype(np.float32)).to_bytes())
    assert np.array_equal(assigned.shards, whole)
    assert np.array_equal(assigned.distances, real.astype(np.float32))
    positions, domains = np.arange(rows, dtype=np.uint32), np.zeros(rows, np.uint16)
    losses = Losses.from_bytes(Losses(positions, real, whole, whole[::-1].copy(), domains, ("law",)).to_bytes())
    assert np.array_equal(losses.loss, real)
    assert np.array_equal(losses.count, whole)
    assert np.array_equal(losses.text_bytes, whole[::-1])


@pytest.mark.parametrize(("name", "key"), FIELDS)
@pytest.mark.parametrize("value", [b"odd", "text", -1, None, {"x": 1}, {"8": {"path": b"1", "chunks": 5}}])
def test_a_field_that_is_something_else_is_refused(name: str, key: str, value: object) -> None:
    if key == "router" and isinstance(value, str):
        return
    record = msgpack.unpackb(RECORDS[name].to_bytes()) | {key: value}
    with pytest.raises(MalformedRecord):
        type(RECORDS[name]).from_bytes(msgpack.packb(record))


@pytest.mark.parametrize(("name", "key"), FIELDS)
def test_a_missing_field_is_refused(name: str, key: str) -> None:
    record = msgpack.unpackb(RECORDS[name].to_bytes())
    del record[key]
    with pytest.raises(MalformedRecord):
        type(RECORDS[name]).from_bytes(msgpack.packb(record))


@pytest.mark.parametrize("key", ["dim", "top_n", "paths", "chunks"])
def test_a_size_that_no_array_has_is_refused(key: str) -> None:
    name = {"dim": "features", "top_n": "assignments", "paths": "routes", "chunks": "losses"}[key]
    record = msgpack.unpackb(RECORDS[name].to_bytes()) | {key: 2**63}
    with pytest.raises(MalformedRecord):
        type(RECORDS[name]).from_bytes(msgpack.packb(record))


@settings(deadline=None)
@given(st.sampled_from(sorted(RECORDS)), st.binary(max_size=40) | st.integers().map(lambda n: msgpack.packb(n % 2**60)))
def test_noise_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        type(RECORDS[name]).from_bytes(data)


@pytest.mark.parametrize("cut", [lambda data: data[:-1], lambda data: data[: len(data) // 2]])
def test_a_record_cut_off_is_refused(cut: Callable[[bytes], bytes]) -> None:
    for record in RECORDS.values():
        with pytest.raises(MalformedRecord):
            type(record).from_bytes(cut(record.to_bytes()))


def test_a_manifest_does_not_depend_on_the_order_of_its_ids() -> None:
    turned = ShardManifest(2, "ab" * 32, IDS[::-1].copy(), 2)
    assert turned.to_bytes() == RECORDS["manifest"].to_bytes()


def test_sequences_below_64_tokens_are_not_evaluated() -> None:
    file = SimpleNamespace(lengths=np.array([64, 63, 200, 12, 65], np.uint32))
    assert evaluated_positions(file, None).tolist() == [0, 2, 4]
    assert evaluated_positions(file, 2).tolist() == [0, 2]


def test_losses_of_an_unnamed_domain_are_refused() -> None:
    record = msgpack.unpackb(RECORDS["losses"].to_bytes()) | {"domain_names": ["code"]}
    with pytest.raises(MalformedRecord, match="domain 1 of 1"):
        Losses.from_bytes(msgpack.packb(record))


def test_routes_to_paths_that_do_not_exist_are_refused() -> None:
    record = msgpack.unpackb(RECORDS["routes"].to_bytes())
    beyond = np.array([1, 0, 4], "<u2").tobytes()
    with pytest.raises(MalformedRecord, match="path 4 of 4"):
        Routes.from_bytes(msgpack.packb(record | {"sequence": beyond}))
    with pytest.raises(MalformedRecord, match="path 4 of 4"):
        Routes.from_bytes(msgpack.packb(record | {"every": {"32": {"path": beyond, "chunks": 1}}}))


@pytest.mark.parametrize("row", [[0.5, 0.5, 0.5, 0.0], [1.5, -0.5, 0.0, 0.0], [np.nan, 1.0, 0.0, 0.0], [np.inf] * 4])
def test_a_posterior_that_is_no_distribution_is_refused(row: list[float]) -> None:
    record = msgpack.unpackb(RECORDS["routes"].to_bytes())
    posterior = np.array([[1, 0, 0, 0], [1, 0, 0, 0], row], "<f4").tobytes()
    with pytest.raises(MalformedRecord, match="posterior"):
        Routes.from_bytes(msgpack.packb(record | {"posterior": posterior}))
