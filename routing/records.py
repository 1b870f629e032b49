"""What tasks of sharding and evaluation write and read: features, assignments, manifests, routes, losses.

Each is a msgpack record with raw little-endian arrays, checked on reading. Torch-free.

Legend: N sequences, D features, S choices of a sequence, C chunks, P paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import msgpack
import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Float64, Int64, UInt16, UInt32, UInt64

MIN_EVALUATED_TOKENS = 64


class MalformedRecord(ValueError):
    """Bytes that are not the record they claim to be."""


class _Sequences(Protocol):
    """The part of a token file that evaluation positions follow from."""

    @property
    def lengths(self) -> npt.NDArray[np.uint32]: ...


def evaluated_positions(file: _Sequences, max_sequences: int | None) -> Int64[np.ndarray, " N"]:
    """Positions of the sequences that count in an evaluation: the first `max_sequences` of at least 64 tokens."""
    positions = np.flatnonzero(np.asarray(file.lengths) >= MIN_EVALUATED_TOKENS)
    return positions[:max_sequences]


def _pack(record: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(record)
    return packed


def _unpack(data: bytes, what: str) -> dict[str, Any]:
    try:
        record = msgpack.unpackb(data)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedRecord(f"not a record of {what}: {error}") from None
    if not isinstance(record, dict):
        raise MalformedRecord(f"not a record of {what}: expected a map, found {type(record).__name__}")
    return record


def _array(record: dict[str, Any], key: str, dtype: str, *shape: int) -> npt.NDArray[Any]:
    """The array under `key`, in its shape (one size may be -1); raises MalformedRecord."""
    raw = record.get(key)
    if not isinstance(raw, bytes):
        raise MalformedRecord(f"a record lacks {key!r}")
    try:
        return np.frombuffer(raw, dtype).reshape(shape)
    except (ValueError, OverflowError):
        raise MalformedRecord(f"{key!r} of a record holds {len(raw)} bytes, which is not {dtype} of {shape}") from None


def _count(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise MalformedRecord(f"{key!r} of a record must be a count, not {value!r}")
    return value


def _name(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise MalformedRecord(f"{key!r} of a record must be a name, not {value!r}")
    return value


def _names(record: dict[str, Any], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MalformedRecord(f"{key!r} of a record must be a list of names, not {value!r}")
    return tuple(value)


def _paths(record: dict[str, Any], key: str, num_paths: int, *shape: int) -> npt.NDArray[np.uint16]:
    """The path indices under `key`, each below `num_paths`."""
    paths = _array(record, key, "<u2", *shape)
    if paths.size and int(paths.max()) >= num_paths:
        raise MalformedRecord(f"a record of routes takes path {int(paths.max())} of {num_paths}")
    return paths


def _intervals(record: dict[str, Any], key: str) -> dict[int, dict[str, Any]]:
    """The entries under `key`, by the interval (tokens) that their key spells."""
    value = record.get(key)
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise MalformedRecord(f"{key!r} of a record must be a map of maps, not {value!r}")
    try:
        return {int(interval): entry for interval, entry in value.items()}
    except ValueError:
        raise MalformedRecord(f"{key!r} of a record must have token counts as keys, not {list(value)}") from None


@dataclass(frozen=True, slots=True)
class Features:
    """z of a sample of sequences, in the order of the token file."""

    ids: UInt64[np.ndarray, " N"]
    z: Float32[np.ndarray, "N D"]

    def to_bytes(self) -> bytes:
        z = self.z.astype("<f4")
        return _pack({"ids": self.ids.astype("<u8").tobytes(), "z": z.tobytes(), "dim": int(z.shape[1])})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        record = _unpack(data, "features")
        ids = _array(record, "ids", "<u8", -1)
        return cls(ids, _array(record, "z", "<f4", len(ids), _count(record, "dim")))


@dataclass(frozen=True, slots=True)
class Assignments:
    """The best shards of every sequence, nearest first, with the distances that the router gives them."""

    ids: UInt64[np.ndarray, " N"]
    shards: UInt32[np.ndarray, "N S"]
    distances: Float32[np.ndarray, "N S"]

    def to_bytes(self) -> bytes:
        return _pack(
            {
                "ids": self.ids.astype("<u8").tobytes(),
                "shards": self.shards.astype("<u4").tobytes(),
                "distances": self.distances.astype("<f4").tobytes(),
                "top_n": int(self.shards.shape[1]),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        record = _unpack(data, "assignments")
        ids = _array(record, "ids", "<u8", -1)
        shape = len(ids), _count(record, "top_n")
        return cls(ids, _array(record, "shards", "<u4", *shape), _array(record, "distances", "<f4", *shape))


@dataclass(frozen=True, slots=True)
class ShardManifest:
    """A shard's identity: its sorted sequence ids and the router that chose them (empty digest: none)."""

    shard: int
    router: str
    ids: UInt64[np.ndarray, " N"]
    overlap: int = 1

    def to_bytes(self) -> bytes:
        ids = np.sort(self.ids).astype("<u8").tobytes()
        return _pack({"shard": self.shard, "router": self.router, "ids": ids, "overlap": self.overlap})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        record = _unpack(data, "a shard's manifest")
        return cls(
            _count(record, "shard"),
            _name(record, "router"),
            _array(record, "ids", "<u8", -1),
            _count(record, "overlap"),
        )


@dataclass(frozen=True, slots=True)
class Routes:
    """The path of every evaluated sequence, and of each of its chunks for every interval (tokens).

    `posterior` is the router's after the prefix, over all paths.
    """

    positions: UInt32[np.ndarray, " N"]
    sequence: UInt16[np.ndarray, " N"]
    posterior: Float32[np.ndarray, "N P"]
    every: dict[int, UInt16[np.ndarray, "N C"]]

    @property
    def num_paths(self) -> int:
        return int(self.posterior.shape[1])

    def to_bytes(self) -> bytes:
        every = {
            str(interval): {"path": paths.astype("<u2").tobytes(), "chunks": int(paths.shape[1])}
            for interval, paths in sorted(self.every.items())
        }
        return _pack(
            {
                "positions": self.positions.astype("<u4").tobytes(),
                "sequence": self.sequence.astype("<u2").tobytes(),
                "posterior": self.posterior.astype("<f4").tobytes(),
                "paths": self.num_paths,
                "every": every,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        record = _unpack(data, "routes")
        positions = _array(record, "positions", "<u4", -1)
        num_paths = _count(record, "paths")
        posterior = _array(record, "posterior", "<f4", len(positions), num_paths)
        if not (posterior >= 0).all() or (np.abs(posterior.sum(axis=1, dtype=np.float64) - 1) > 1e-3).any():
            raise MalformedRecord("a record of routes has a posterior that is none")
        return cls(
            positions,
            _paths(record, "sequence", num_paths, len(positions)),
            posterior,
            {
                interval: _paths(entry, "path", num_paths, len(positions), _count(entry, "chunks"))
                for interval, entry in _intervals(record, "every").items()
            },
        )


@dataclass(frozen=True, slots=True)
class Losses:
    """Summed loss (nats), counted targets and their UTF-8 bytes of evaluated sequences, by chunk, under one path."""

    positions: UInt32[np.ndarray, " N"]
    loss: Float64[np.ndarray, "N C"]
    count: UInt32[np.ndarray, "N C"]
    text_bytes: UInt32[np.ndarray, "N C"]
    domains: UInt16[np.ndarray, " N"]
    domain_names: tuple[str, ...]

    def to_bytes(self) -> bytes:
        return _pack(
            {
                "positions": self.positions.astype("<u4").tobytes(),
                "loss": self.loss.astype("<f8").tobytes(),
                "count": self.count.astype("<u4").tobytes(),
                "bytes": self.text_bytes.astype("<u4").tobytes(),
                "chunks": int(self.loss.shape[1]),
                "domains": self.domains.astype("<u2").tobytes(),
                "domain_names": list(self.domain_names),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        record = _unpack(data, "losses")
        positions = _array(record, "positions", "<u4", -1)
        shape = len(positions), _count(record, "chunks")
        domains, names = _array(record, "domains", "<u2", len(positions)), _names(record, "domain_names")
        if len(domains) and int(domains.max()) >= len(names):
            raise MalformedRecord(f"a record of losses has a sequence of domain {int(domains.max())} of {len(names)}")
        return cls(
            positions,
            _array(record, "loss", "<f8", *shape),
            _array(record, "count", "<u4", *shape),
            _array(record, "bytes", "<u4", *shape),
            domains,
            names,
        )
