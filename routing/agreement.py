"""How well a router's choice agrees with the oracle's, the path under which a sequence has the lowest loss. Torch-free.

Legend: N sequences, C chunks, P paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

from routing.prediction import Prediction, chosen, oracle
from routing.tables import LossTable


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of sequences, and losses in nats per counted token.

    `by_chance` is the agreement of two choosers with these loads that know nothing of each other (Cohen 1960).
    `best_path` is the one path with the lowest loss of all sequences together.
    """

    sequences: int
    tokens: int
    agreement: float
    by_chance: float
    router_loss: float
    oracle_loss: float
    best_path: int
    best_path_loss: float
    oracle_load: Float64[np.ndarray, " P"]


def agreement(table: LossTable, choice: Int64[np.ndarray, " N"]) -> Agreement:
    """Of `choice`, a path for every sequence of the table, which has at least one counted token."""
    best = oracle(table, table.num_chunks)
    of_router, of_oracle = _shares(choice, table.num_paths), _shares(best[:, 0], table.num_paths)
    single = int(table.loss.sum(axis=(0, 1)).argmin())
    return Agreement(
        sequences=len(choice),
        tokens=table.tokens,
        agreement=float((choice == best[:, 0]).mean()),
        by_chance=float(of_router @ of_oracle),
        router_loss=_mean(table, chosen(table, np.repeat(choice[:, None], table.num_chunks, axis=1))),
        oracle_loss=_mean(table, chosen(table, best)),
        best_path=single,
        best_path_loss=_mean(table, chosen(table, np.full(table.count.shape, single, np.int64))),
        oracle_load=of_oracle,
    )


def _shares(choice: npt.NDArray[np.int64], num_paths: int) -> Float64[np.ndarray, " P"]:
    return np.bincount(choice, minlength=num_paths) / len(choice)


def _mean(table: LossTable, prediction: Prediction) -> float:
    return float(prediction.losses.sum() / table.tokens)
