"""How far the traffic of today is from what was trained on: in the shares of paths, and in every feature. Torch-free.

PSI, the population stability index of credit scoring (Siddiqi, Credit Risk Scorecards, 2006), is the symmetrised KL
divergence of two histograms: sum_b (p_b - q_b) ln(p_b / q_b). Its customary bounds, 0.1 and 0.25, know nothing of
sample sizes; without any drift it comes to about (1/n + 1/m) times a chi-squared variable of B - 1 degrees of freedom
(Yurdakul and Naranjo, J. Risk Model Validation 14(4), 2020; compare arXiv 2307.11878), which stands beside it here.

Legend: n, m sizes of two samples, B bins, N rows, E features, F features that vary, K cuts between bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float64, Int64

SMALL, LARGE = 0.1, 0.25
_PSEUDO_COUNT = 0.5  # what a sample happened not to hit is not impossible: half a row more in each bin
_DECILES = np.arange(1, 10) / 10
_NORMAL_95 = 1.6448536269514722


def stability_index(counts: npt.NDArray[Any], reference: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """PSI of histograms over the same bins, the last axis; 0 where they are alike."""
    p, q = _shares(counts), _shares(reference)
    return np.asarray(((p - q) * np.log(p / q)).sum(axis=-1), np.float64)


def _shares(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    raised = counts.astype(np.float64) + _PSEUDO_COUNT
    shares: npt.NDArray[np.float64] = raised / raised.sum(axis=-1, keepdims=True)
    return shares


def index_by_chance(bins: int, first: float, second: float) -> float:
    """The PSI that 95 % of pairs of samples of these (effective) sizes stay under when nothing has drifted.

    The quantile of chi-squared is that of Wilson and Hilferty (PNAS 17, 1931).
    """
    freedom = bins - 1
    if freedom < 1:
        return 0.0
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + _NORMAL_95 * math.sqrt(spread)) ** 3
    return quantile * (1 / first + 1 / second)


def verdict(index: float, by_chance: float) -> str:
    """What a PSI says, in words."""
    if index <= by_chance:
        return "no more than chance"
    return "small" if index < SMALL else "moderate" if index < LARGE else "large"


def jensen_shannon(p: npt.NDArray[Any], q: npt.NDArray[Any]) -> float:
    """The Jensen-Shannon divergence (bits: 0 alike, 1 apart) of two distributions (Lin, IEEE Trans. IT 37, 1991)."""
    middle = (p + q) / 2
    return float((_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2)


def _relative_entropy(p: npt.NDArray[Any], q: npt.NDArray[Any]) -> float:
    held = p > 0
    return float((p[held] * np.log2(p[held] / q[held])).sum())


@dataclass(frozen=True, slots=True)
class ShiftSummary:
    """Drift of all features together. Shifts of the mean are in standard deviations of the reference.

    `psi_*` are over the features, by the deciles of the reference; `largest` names those with the highest PSI.
    """

    features: int
    psi_median: float
    psi_highest: float
    psi_above_large: int
    rms_shift: float
    largest: tuple[tuple[int, float, float], ...]


class FeatureDrift:
    """Counts rows of traffic into the deciles that each feature has in the reference; memory is that of the counts.

    Features that do not vary in the reference are left out.
    """

    def __init__(self, reference: Float64[np.ndarray, "N E"]) -> None:
        deviations = reference.std(axis=0)
        scale = np.abs(reference).max(axis=0)
        self._varying: Bool[np.ndarray, " E"] = deviations > 1e-9 * np.maximum(scale, 1e-300)
        kept = reference[:, self._varying]
        self._mean, self._deviation = kept.mean(axis=0), deviations[self._varying]
        self._cuts: Float64[np.ndarray, "K F"] = np.quantile(kept, _DECILES, axis=0)
        self._expected = self._counted(kept)
        self._counts = np.zeros_like(self._expected)
        self._sums = np.zeros(kept.shape[1])
        self._rows = 0

    def _counted(self, rows: Float64[np.ndarray, "N F"]) -> Int64[np.ndarray, "F B"]:
        bins = (rows[:, None, :] > self._cuts).sum(axis=1)  # (N, F)
        return np.stack([(bins == index).sum(axis=0) for index in range(len(self._cuts) + 1)], axis=1)

    def add(self, rows: Float64[np.ndarray, "N E"]) -> None:
        """Count some rows of the traffic."""
        kept = rows[:, self._varying]
        self._counts += self._counted(kept)
        self._sums += kept.sum(axis=0)
        self._rows += len(kept)

    def summary(self, largest: int = 5) -> ShiftSummary | None:
        """The drift of what was added; None without a row, or a feature."""
        if not self._rows or not self._varying.any():
            return None
        psi = stability_index(self._counts, self._expected)  # (F,)
        shift = (self._sums / self._rows - self._mean) / self._deviation
        names = np.flatnonzero(self._varying)
        order = np.argsort(-psi, kind="stable")[:largest]
        return ShiftSummary(
            features=len(names),
            psi_median=float(np.median(psi)),
            psi_highest=float(psi.max()),
            psi_above_large=int((psi > LARGE).sum()),
            rms_shift=float(np.sqrt(np.square(shift).mean())),
            largest=tuple((int(names[index]), float(psi[index]), float(shift[index])) for index in order),
        )
