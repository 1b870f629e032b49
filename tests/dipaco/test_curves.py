from __future__ import annotations

import sys
from typing import Any

import pytest

from dipaco.curves import MissingExtra, draw, loss_curves


def task(model: str, path: str, first_step: int, losses: list[float]) -> dict[str, Any]:
    return {"kind": "TRAIN", "model": model, "path": path, "first_step": first_step, "step_losses": losses}


METRICS = [
    task("base", "0", 0, [8.0, 6.0]),
    task("mixture", "0.1", 4, [3.0, 1.0]),
    task("mixture", "0.0", 2, [5.0, 4.0]),
    task("mixture", "0.0", 2, [7.0, 6.0]),  # another replica of the same path
    {"kind": "PACK"},
]


def test_curves_by_model_and_path_average_windows_and_replicas() -> None:
    assert loss_curves(METRICS, window=2) == {
        "base": {"0": [(2, 7.0)]},
        "mixture": {"0.0": [(4, 5.5)], "0.1": [(6, 2.0)]},
    }


@pytest.mark.extra
def test_the_picture_is_a_png() -> None:
    pytest.importorskip("matplotlib")
    assert draw(loss_curves(METRICS, window=1)).startswith(b"\x89PNG")


def test_without_matplotlib_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dipaco\[report\]'"):
        draw({})
