"""The load on every path, and how many independent sequences it is worth: those of one document go alike. Torch-free.

Legend: N sequences, D documents, P paths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64


class PathLoad:
    """Counts sequences by path, batch by batch; the sequences of a document come in one batch."""

    def __init__(self, num_paths: int) -> None:
        self.counts: Int64[np.ndarray, " P"] = np.zeros(num_paths, np.int64)
        self.documents = 0
        self._squares = np.zeros(num_paths)  # over documents, of their sequences on the path
        self._products = np.zeros(num_paths)  # the same times the document's sequences
        self._size_squares = 0.0

    def add(self, paths: Int64[np.ndarray, " N"], documents: npt.NDArray[Any]) -> None:
        """The paths of some sequences and the documents that they belong to."""
        names, document = np.unique(documents, return_inverse=True)
        num_paths = len(self.counts)
        held = np.bincount(document * num_paths + paths, minlength=len(names) * num_paths).reshape(-1, num_paths)
        sizes = held.sum(axis=1)  # (D,)
        self.counts += held.sum(axis=0)
        self.documents += len(names)
        self._squares += np.square(held.astype(np.float64)).sum(axis=0)
        self._products += sizes.astype(np.float64) @ held
        self._size_squares += float(np.square(sizes.astype(np.float64)).sum())

    @property
    def sequences(self) -> int:
        return int(self.counts.sum())

    @property
    def shares(self) -> Float64[np.ndarray, " P"]:
        """What share of the sequences each path has; there must be one."""
        shares: npt.NDArray[np.float64] = self.counts / self.counts.sum()
        return shares

    @property
    def effective_size(self) -> float:
        """How many independent sequences would tell as much: between the number of documents and that of sequences.

        Sequences over the mean design effect of Rao and Scott (JASA 76, 1981), by which a chi-squared statistic of
        clustered counts is to be divided: sum_p (1 - share_p) effect_p / (P - 1).
        """
        taken = self.counts > 0
        if self.documents < 2 or taken.sum() < 2:
            return float(self.documents)
        shares = self.shares
        deviations = self._squares - 2 * shares * self._products + shares**2 * self._size_squares
        variances = deviations * self.documents / (self.documents - 1) / self.sequences**2  # of the shares
        effect = self.sequences * float((variances[taken] / shares[taken]).sum()) / (int(taken.sum()) - 1)
        return float(min(max(self.sequences / max(effect, 1.0), self.documents), self.sequences))
