"""The linear map from features z to the space that routers are fitted in: none, standardised or whitened.

Legend: N sequences, D features, E transformed features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64

_TINY = 1e-12
# Products held at once: a megabyte, so that they stay in the cache.
_BLOCK_VALUES = 2**17


def fit_transform(
    rows: Float64[np.ndarray, "N D"], kind: str
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, "D E"]]:
    """Mean and matrix of `z -> (z - mean) @ matrix`; `whiten` drops directions without variance."""
    size = rows.shape[1]
    if kind == "none":
        return np.zeros(size), np.eye(size)
    mean, scale = rows.mean(axis=0), 1.0 / np.maximum(rows.std(axis=0), _TINY)
    if kind == "standardize":
        return mean, np.diag(scale)
    scaled = (rows - mean) * scale
    variances, directions = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    order = np.argsort(-variances, kind="stable")
    variances, directions = variances[order], directions[:, order]
    kept = variances > 1e-6 * variances[0]
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(size)])
    whitening = directions * signs / np.sqrt(np.maximum(variances, _TINY))
    return mean, (scale[:, None] * whitening)[:, kept]


def row_products(rows: Float64[np.ndarray, "N D"], matrix: Float64[np.ndarray, "D E"]) -> npt.NDArray[np.float64]:
    """`rows @ matrix` (N, E), summed in an order that depends neither on the rows beside a row nor on threads."""
    columns = np.ascontiguousarray(matrix.T)  # (E, D)
    products = np.empty((len(rows), len(columns)))
    step = max(1, _BLOCK_VALUES // max(1, matrix.size))
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step])
        products[start : start + step] = (block[:, None, :] * columns).sum(axis=2)
    return products
