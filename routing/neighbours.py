"""Which training sequences lie near a point in feature space: what a path is for, told by examples. Torch-free.

Distances are Euclidean, in the space that the router was fitted in. Windows of one document are much alike, so a
document is named once.

Legend: N sequences, E features, k wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

_BLOCK = 128


def nearest(
    rows: Float64[np.ndarray, "N E"], point: Float64[np.ndarray, " E"], documents: npt.NDArray[Any], wanted: int
) -> tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """The rows nearest to `point`, one a document (ties: the lower index first), and their distances."""
    distances = np.sqrt(np.square(rows - point).sum(axis=1))
    order = np.argsort(distances, kind="stable")
    _, first = np.unique(documents[order], return_index=True)
    chosen = order[np.sort(first)[:wanted]]
    return chosen, distances[chosen]


def most_typical(
    rows: Float64[np.ndarray, "N E"], documents: npt.NDArray[Any], wanted: int
) -> tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """The rows nearest to the mean of all."""
    return nearest(rows, rows.mean(axis=0), documents, wanted)


def own_distances(rows: Float64[np.ndarray, "N E"], documents: npt.NDArray[Any]) -> Float64[np.ndarray, " N"]:
    """The distance of every row to the nearest row of another document (infinite where there is none).

    What the distance of a text to the nearest of these rows has to be held against.
    """
    squares = np.square(rows).sum(axis=1)
    found = [np.zeros(0)]
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        products = squares[block, None] + squares - 2 * rows[block] @ rows.T
        products[documents[block, None] == documents] = np.inf
        found.append(products.min(axis=1))
    distances: npt.NDArray[np.float64] = np.sqrt(np.maximum(np.concatenate(found), 0.0))
    return distances
