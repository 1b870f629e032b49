"""The gater: multinomial logistic regression on z, frozen (DiPaCo Sec 2.4.2 and 7.2.1). It stands where clusters do.

The training assignment may be capped, on minus the log posterior as a distance; inference takes the likeliest path.

Legend: N sequences, D features, E transformed features, P paths.
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
from routing.transform import row_products


@dataclass(frozen=True, slots=True)
class Gater:
    """`z -> (z - mean) @ matrix @ weights + bias`: one logit a path. A row's numbers do not depend on other rows."""

    mean: Float64[np.ndarray, " D"]
    matrix: Float64[np.ndarray, "D E"]
    weights: Float64[np.ndarray, "E P"]
    bias: Float64[np.ndarray, " P"]
    prefix_tokens: int

    @property
    def num_shards(self) -> int:
        return len(self.bias)

    @property
    def num_paths(self) -> int:
        return len(self.bias)

    @property
    def replicas(self) -> int:
        """A path has one shard."""
        return 1

    def transform(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N E"]:
        """Features in the space of the weights."""
        return row_products(np.asarray(z, np.float64) - self.mean, self.matrix)

    def logits(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N P"]:
        """Log posterior of every path, up to a constant of the row."""
        logits: npt.NDArray[np.float64] = row_products(self.transform(z), self.weights) + self.bias
        return logits

    def posterior(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N P"]:
        """Softmax of the logits."""
        posterior: npt.NDArray[np.float64] = np.exp(-self.distances(z))
        return posterior

    def distances(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N P"]:
        """Minus the log posterior (nats), finite where a posterior would round to zero."""
        logits = self.logits(z)
        below: npt.NDArray[np.float64] = logits.max(axis=1, keepdims=True) - logits
        distances: npt.NDArray[np.float64] = below + np.log(np.exp(-below).sum(axis=1, keepdims=True))
        return distances

    def nearest(self, z: npt.NDArray[Any], top_n: int) -> tuple[Int64[np.ndarray, "N S"], Float64[np.ndarray, "N S"]]:
        """The `top_n` likeliest paths of every row (ties: the lower index first), and their `distances`."""
        distances = self.distances(z)
        order = np.argsort(distances, axis=1, kind="stable")[:, :top_n]
        return order, np.take_along_axis(distances, order, axis=1)

    def paths(self, z: npt.NDArray[Any]) -> Int64[np.ndarray, " N"]:
        """The likeliest path of every row."""
        likeliest: npt.NDArray[np.int64] = self.distances(z).argmin(axis=1)
        return likeliest

    def to_bytes(self) -> bytes:
        """The frozen form: msgpack with raw little-endian float64."""
        packed: bytes = msgpack.packb(
            {
                "kind": "gater",
                "mean": self.mean.astype("<f8").tobytes(),
                "matrix": self.matrix.astype("<f8").tobytes(),
                "weights": self.weights.astype("<f8").tobytes(),
                "bias": self.bias.astype("<f8").tobytes(),
                "prefix_tokens": self.prefix_tokens,
            }
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`; raises MalformedRecord."""
        try:
            record = msgpack.unpackb(data)
            if record["kind"] != "gater":
                raise MalformedRecord(f"a router of kind {record['kind']!r} where a 'gater' was expected")
            mean, bias = _finite(record, "mean"), _finite(record, "bias")
            matrix = _finite(record, "matrix").reshape(len(mean), -1)
            weights = _finite(record, "weights").reshape(matrix.shape[1], len(bias))
            prefix_tokens = record["prefix_tokens"]
        except MalformedRecord:
            raise
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise MalformedRecord(f"not a gater: {error}") from None
        if type(prefix_tokens) is not int or prefix_tokens < 1:
            raise MalformedRecord(f"a gater's prefix_tokens must be a positive number, not {prefix_tokens!r}")
        return cls(mean, matrix, weights, bias, prefix_tokens)

    @property
    def version(self) -> str:
        """SHA-256 of the frozen form."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _finite(record: Any, key: str) -> npt.NDArray[np.float64]:
    """The numbers under `key`: at least one, all finite."""
    values = np.frombuffer(record[key], "<f8")
    if not values.size or not np.isfinite(values).all():
        raise MalformedRecord(f"{key!r} of a gater is empty or holds values that are not finite")
    return values
