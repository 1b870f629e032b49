"""The bias that makes argmax hand out wanted shares: the balancing of DiPaCo Sec 7.2, where rare paths would starve.

The wanted shift minimises the convex function `sum_n max_p (logit_np + shift_p) - sum_p wanted_p shift_p`: its
subgradient is what argmax hands out minus what is wanted. Smoothed by a temperature it is the dual of entropic optimal
transport and is minimised by the scaling of Sinkhorn (1967; Cuturi, arXiv 1306.0895) while the temperature falls; then
the shift of one path at a time is set exactly. Deterministic.

Legend: N sequences, P paths.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

TEMPERATURES = 10
STEPS_A_TEMPERATURE = 20
SWEEPS = 10


def matched_shift(logits: Float64[np.ndarray, "N P"], wanted: Int64[np.ndarray, " P"]) -> Float64[np.ndarray, " P"]:
    """The best shift found: `wanted` counts of rows (positive, N together) against those of argmax(logits + shift).

    Better is: fewer paths without any row, then fewer rows too many. Rows that are alike stay together, so a match is
    not always there; no shift is returned where none betters argmax(logits).
    """
    assert wanted.min() > 0, f"{wanted.tolist()} rows wanted"
    assert wanted.sum() == len(logits), f"{wanted.sum()} rows wanted of {len(logits)}"
    best: npt.NDArray[np.float64] = np.zeros(len(wanted))
    least = _missed(logits, wanted)
    for shift in _iterates(logits, wanted):
        if least == (0, 0):
            break
        missed = _missed(logits + shift, wanted)
        if missed < least:
            best, least = shift, missed
    return best


def _missed(scores: Float64[np.ndarray, "N P"], wanted: Int64[np.ndarray, " P"]) -> tuple[int, int]:
    """Paths that get no row, and rows that some path gets too many."""
    handed = np.bincount(scores.argmax(axis=1), minlength=len(wanted))
    return int((handed == 0).sum()), int(np.maximum(handed - wanted, 0).sum())


def _iterates(logits: Float64[np.ndarray, "N P"], wanted: Int64[np.ndarray, " P"]) -> Iterator[npt.NDArray[np.float64]]:
    """Shifts by falling temperature, then path by path; none where every row has equal logits."""
    shift = np.zeros(len(wanted))
    spread = float((logits.max(axis=1) - logits.mean(axis=1)).mean())
    if len(wanted) < 2 or spread == 0.0:
        return
    for level in range(TEMPERATURES):
        temperature = spread * 0.5**level
        for _ in range(STEPS_A_TEMPERATURE):
            shift = _scaled(logits, shift, wanted, temperature)
            yield shift
    for _ in range(SWEEPS):
        for path in range(len(wanted)):
            shift = shift.copy()
            shift[path] = _exact(logits, shift, path, int(wanted[path]))
            yield shift


def _scaled(
    logits: Float64[np.ndarray, "N P"],
    shift: Float64[np.ndarray, " P"],
    wanted: Int64[np.ndarray, " P"],
    temperature: float,
) -> npt.NDArray[np.float64]:
    """The shift after one scaling of the softmax's column sums to what is wanted."""
    scores = (logits + shift) / temperature
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    handed = np.maximum(weights.sum(axis=0), np.finfo(np.float64).tiny)
    scaled: npt.NDArray[np.float64] = shift + temperature * np.log(wanted / handed)
    return scaled


def _exact(logits: Float64[np.ndarray, "N P"], shift: Float64[np.ndarray, " P"], path: int, wanted: int) -> float:
    """The shift with which `path` gets its wanted rows, those of the others as they are."""
    others = logits + shift
    others[:, path] = -np.inf
    needed = np.sort(others.max(axis=1) - logits[:, path])  # above which shift each row goes to the path
    return float(needed[wanted - 1] + needed[wanted]) / 2
