"""The records of an evaluation joined over token files and paths: a table of losses, a table of routes.

Legend: N sequences, C chunks of the loss grid, c chunks of an interval, P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Float64, Int64, UInt32

from routing.records import Losses, MalformedRecord, Routes


@dataclass(frozen=True, slots=True)
class LossTable:
    """Losses (nats) of the same sequences under every path of one model, with counts that all paths share."""

    loss: Float64[np.ndarray, "N C P"]
    count: UInt32[np.ndarray, "N C"]
    text_bytes: UInt32[np.ndarray, "N C"]
    domains: Int64[np.ndarray, " N"]
    domain_names: tuple[str, ...]

    @classmethod
    def join(cls, paths: Sequence[Sequence[Losses]]) -> LossTable:
        """The table of a model from its records: for each path, one record a token file, files in the same order."""
        names = tuple(sorted({name for record in paths[0] for name in record.domain_names}))
        for path in paths[1:]:
            for record, first in zip(path, paths[0], strict=True):
                same = np.array_equal(record.positions, first.positions) and np.array_equal(record.count, first.count)
                if not same:
                    raise MalformedRecord("two paths were evaluated on different sequences")
        return cls(
            np.stack([np.concatenate([record.loss for record in path]) for path in paths], axis=2),
            np.concatenate([record.count for record in paths[0]]),
            np.concatenate([record.text_bytes for record in paths[0]]),
            np.concatenate([_renamed(record, names) for record in paths[0]]),
            names,
        )

    @property
    def num_paths(self) -> int:
        return int(self.loss.shape[2])

    @property
    def num_chunks(self) -> int:
        return int(self.loss.shape[1])

    @property
    def tokens(self) -> int:
        return int(self.count.sum(dtype=np.int64))

    def under(self, choice: npt.NDArray[np.int64]) -> Float64[np.ndarray, "N C"]:
        """The losses with path `choice` (N, C) in each chunk."""
        chosen: npt.NDArray[np.float64] = np.take_along_axis(self.loss, choice[:, :, None], axis=2)[:, :, 0]
        return chosen


def _renamed(record: Losses, names: tuple[str, ...]) -> Int64[np.ndarray, " N"]:
    places = np.array([names.index(name) for name in record.domain_names], np.int64)
    renamed: npt.NDArray[np.int64] = places[record.domains]
    return renamed


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The router's paths for the sequences of a LossTable, in its order, and its posterior after the prefix."""

    sequence: Int64[np.ndarray, " N"]
    posterior: Float32[np.ndarray, "N P"]
    every: dict[int, Int64[np.ndarray, "N c"]]

    @classmethod
    def join(cls, records: Sequence[Routes]) -> RouteTable:
        """From one record a token file, in the order of the losses."""
        if len({record.num_paths for record in records}) > 1:
            raise MalformedRecord("two token files were routed over different numbers of paths")
        every = {
            interval: np.concatenate([record.every[interval] for record in records]).astype(np.int64)
            for interval in records[0].every
        }
        return cls(
            np.concatenate([record.sequence for record in records]).astype(np.int64),
            np.concatenate([record.posterior for record in records]),
            every,
        )

    @property
    def num_paths(self) -> int:
        return int(self.posterior.shape[1])
