"""Agreement with the oracle, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from routing.agreement import agreement
from routing.tables import LossTable

# Four sequences of two chunks under three paths; totals (3, 4, 9), (6, 2, 9), (5, 1, 9), (2, 8, 9).
LOSS = np.array(
    [
        [[1.0, 4.0, 4.0], [2.0, 0.0, 5.0]],
        [[3.0, 1.0, 4.0], [3.0, 1.0, 5.0]],
        [[5.0, 0.5, 4.0], [0.0, 0.5, 5.0]],
        [[1.0, 4.0, 4.0], [1.0, 4.0, 5.0]],
    ]
)
COUNT = np.array([[8, 8], [8, 8], [8, 0], [8, 8]], np.uint32)
TABLE = LossTable(LOSS, COUNT, COUNT, np.zeros(4, np.int64), ("prose",))


def test_shares_and_losses_are_those_worked_out_by_hand() -> None:
    found = agreement(TABLE, np.array([0, 1, 0, 2]))
    assert (found.sequences, found.tokens) == (4, 56)
    assert found.agreement == 0.5
    assert found.oracle_load.tolist() == [0.5, 0.5, 0.0]
    assert found.by_chance == pytest.approx(0.5 * 0.5 + 0.25 * 0.5)
    assert found.router_loss == pytest.approx((3 + 2 + 5 + 9) / 56)
    assert found.oracle_loss == pytest.approx((3 + 2 + 1 + 2) / 56)
    assert found.best_path == 1
    assert found.best_path_loss == pytest.approx(15 / 56)


def test_the_oracle_agrees_with_itself() -> None:
    found = agreement(TABLE, np.array([0, 1, 1, 0]))
    assert found.agreement == 1.0
    assert found.by_chance == 0.5
    assert found.router_loss == found.oracle_loss
