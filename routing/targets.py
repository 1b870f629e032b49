"""What the router LM learns: at every token the path that is best for the next ones. Pure numpy.

Token-exact, over the next W tokens (DiPaCo, arXiv 2403.10616, Sec 7.2.2: T_ij = argmax over paths of the sum of scores
of the next L tokens). A token file of paths stands beside that of the tokens, sequence for sequence.

Legend: N sequences, C counted tokens (after the prefix), W window, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, UInt16

NO_TARGET = 0xFFFF
"""In the place of a token that has no target: BOS, the prefix before its last token, the last token."""


def best_next_paths(losses: Iterable[Float64[np.ndarray, "N C"]], window: int) -> UInt16[np.ndarray, "N C"]:
    """The path with the least loss of tokens c .. c + window - 1 (ties: the lower index), for every c.

    `losses`: one table a path, in the order of the paths, of single tokens (0 where a sequence has ended); only one of
    them is needed at a time.
    """
    least: npt.NDArray[np.float64] | None = None
    best: npt.NDArray[np.uint16] = np.zeros((0, 0), np.uint16)
    for path_index, table in enumerate(losses):
        assert path_index < NO_TARGET, "more paths than a target can name"
        ahead = _sums_ahead(table, window)
        if least is None:
            least, best = ahead, np.zeros(ahead.shape, np.uint16)
            continue
        better = ahead < least
        least[better], best[better] = ahead[better], path_index
    return best


def _sums_ahead(table: Float64[np.ndarray, "N C"], window: int) -> npt.NDArray[np.float64]:
    """Sums over c .. c + window - 1, as far as the table goes."""
    num_tokens = table.shape[1]
    until = np.zeros((len(table), num_tokens + 1))
    np.cumsum(table, axis=1, out=until[:, 1:])
    starts = np.arange(num_tokens)
    ahead: npt.NDArray[np.float64] = until[:, np.minimum(starts + window, num_tokens)] - until[:, starts]
    return ahead


def targets_of(best: UInt16[np.ndarray, " C"], length: int, prefix_tokens: int) -> UInt16[np.ndarray, " L"]:
    """The targets of a sequence of `length` tokens, BOS included.

    The router that has read token prefix_tokens + c predicts the best path from counted token c on.
    """
    targets = np.full(length, NO_TARGET, np.uint16)
    counted = max(0, length - 1 - prefix_tokens)
    targets[prefix_tokens : prefix_tokens + counted] = best[:counted]
    return targets
