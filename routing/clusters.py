"""Cluster centres in a transformed feature space: the frozen thing that gives every z its shard, and its path.

k-means (DiPaCo Eq 1) has one group of dimensions and one centre a shard; product k-means (Sec 7.3) one group and one
set of centres a level, and a shard is a choice in each. The training assignment may be capped, inference takes the
nearest.

Legend: N sequences, D features, E transformed features, S shards, P paths.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Self

import msgpack
import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

from routing.records import MalformedRecord


@dataclass(frozen=True, slots=True)
class Group:
    """One group of transformed dimensions with its centres."""

    dimensions: Int64[np.ndarray, " G"]
    centres: Float64[np.ndarray, "K G"]


@dataclass(frozen=True, slots=True)
class Clusters:
    """`z -> (z - mean) @ matrix`, then squared distances to the centres, summed over groups, row-major."""

    mean: Float64[np.ndarray, " D"]
    matrix: Float64[np.ndarray, "D E"]
    groups: tuple[Group, ...]
    replicas: int
    prefix_tokens: int

    @property
    def num_shards(self) -> int:
        return int(np.prod([len(group.centres) for group in self.groups]))

    @property
    def num_paths(self) -> int:
        return self.num_shards // self.replicas

    def transform(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N E"]:
        """Features in the space of the centres."""
        transformed: npt.NDArray[np.float64] = (np.asarray(z, np.float64) - self.mean) @ self.matrix
        return transformed

    def distances(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N S"]:
        """Squared distance to every shard."""
        transformed = self.transform(z)
        total = np.zeros((len(transformed), 1))
        for group in self.groups:
            part = squared_distances(transformed[:, group.dimensions], group.centres)
            total = (total[:, :, None] + part[:, None, :]).reshape(len(transformed), -1)
        return total

    def nearest(self, z: npt.NDArray[Any], top_n: int) -> tuple[Int64[np.ndarray, "N S"], Float64[np.ndarray, "N S"]]:
        """The `top_n` nearest shards of every row (ties: the lower index first), and their squared distances."""
        distances = self.distances(z)
        order = np.argsort(distances, axis=1, kind="stable")[:, :top_n]
        return order, np.take_along_axis(distances, order, axis=1)

    def paths(self, z: npt.NDArray[Any]) -> Int64[np.ndarray, " N"]:
        """The path of every row: that of its nearest shard."""
        return self.nearest(z, 1)[0][:, 0] // self.replicas

    def posterior(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N P"]:
        """Softmax of minus half the squared distance (unit Gaussians of equal weight), summed over a path's shards."""
        scores = -0.5 * self.distances(z)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        posterior: npt.NDArray[np.float64] = weights.reshape(len(weights), self.num_paths, self.replicas).sum(axis=2)
        return posterior

    def to_bytes(self) -> bytes:
        """The frozen form: msgpack with raw little-endian float64."""
        packed: bytes = msgpack.packb(
            {
                "kind": "clusters",
                "mean": self.mean.astype("<f8").tobytes(),
                "matrix": self.matrix.astype("<f8").tobytes(),
                "groups": [
                    {
                        "dimensions": group.dimensions.astype("<i8").tobytes(),
                        "centres": group.centres.astype("<f8").tobytes(),
                    }
                    for group in self.groups
                ],
                "replicas": self.replicas,
                "prefix_tokens": self.prefix_tokens,
            }
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`; raises MalformedRecord."""
        try:
            record = msgpack.unpackb(data)
            if record["kind"] != "clusters":
                raise MalformedRecord(f"a router of kind {record['kind']!r}; this version reads 'clusters'")
            mean = np.frombuffer(record["mean"], "<f8")
            matrix = np.frombuffer(record["matrix"], "<f8").reshape(len(mean), -1)
            groups = tuple(_group(entry, matrix.shape[1]) for entry in record["groups"])
            if not groups or not matrix.size:
                raise MalformedRecord("a router without centres or features")
            return cls(mean, matrix, groups, int(record["replicas"]), int(record["prefix_tokens"]))
        except MalformedRecord:
            raise
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise MalformedRecord(f"not a router: {error}") from None

    @property
    def version(self) -> str:
        """SHA-256 of the frozen form."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _group(entry: Any, size: int) -> Group:
    """A group of a frozen form whose transform has `size` dimensions."""
    dimensions = np.frombuffer(entry["dimensions"], "<i8")
    centres = np.frombuffer(entry["centres"], "<f8").reshape(-1, len(dimensions))
    if not centres.size or dimensions.min() < 0 or dimensions.max() >= size:
        raise MalformedRecord(f"a router has centres of dimensions {dimensions.tolist()} out of {size}")
    return Group(dimensions, centres)


def squared_distances(rows: Float64[np.ndarray, "N G"], centres: Float64[np.ndarray, "K G"]) -> npt.NDArray[np.float64]:
    """(N, K), computed per centre so that a row's distances do not depend on the rows beside it."""
    return np.stack([np.square(rows - centre).sum(axis=1) for centre in centres], axis=1)
