"""A frozen router: what clusters and the gater offer alike, and reading either from its bytes. Torch-free.

Legend: N sequences, D features, E transformed features, S shards, P paths.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgpack
import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

from routing.clusters import Clusters
from routing.gater import Gater
from routing.records import MalformedRecord


class FrozenRouter(Protocol):
    """From features z (N, D) to shards and paths; the shards of path p are `p * replicas` and those that follow."""

    @property
    def prefix_tokens(self) -> int: ...

    @property
    def num_shards(self) -> int: ...

    @property
    def num_paths(self) -> int: ...

    @property
    def replicas(self) -> int: ...

    @property
    def version(self) -> str:
        """SHA-256 of the frozen form."""
        ...

    def transform(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N E"]:
        """Features in the space that the router was fitted in."""
        ...

    def distances(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N S"]:
        """How far every shard is: the smaller, the better, and comparable between rows."""
        ...

    def nearest(self, z: npt.NDArray[Any], top_n: int) -> tuple[Int64[np.ndarray, "N n"], Float64[np.ndarray, "N n"]]:
        """The `top_n` nearest shards of every row, ties by index, and their distances."""
        ...

    def paths(self, z: npt.NDArray[Any]) -> Int64[np.ndarray, " N"]:
        """The path of the nearest shard."""
        ...

    def posterior(self, z: npt.NDArray[Any]) -> Float64[np.ndarray, "N P"]:
        """Probabilities of the paths."""
        ...

    def to_bytes(self) -> bytes:
        """The form that `read_router` reads."""
        ...


def read_router(data: bytes) -> FrozenRouter:
    """The router that its bytes say they are; raises MalformedRecord."""
    try:
        kind = msgpack.unpackb(data)["kind"]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise MalformedRecord(f"not a router: {error}") from None
    if kind == "clusters":
        return Clusters.from_bytes(data)
    if kind == "gater":
        return Gater.from_bytes(data)
    raise MalformedRecord(f"a router of kind {kind!r}; this version reads 'clusters' and 'gater'")
