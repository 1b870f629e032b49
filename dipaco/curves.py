"""Loss curves of a run from the metrics of its tasks, and their picture (matplotlib, imported late)."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Curve = list[tuple[int, float]]
"""(step counter of the path, mean training loss in nats per token up to it)."""


class MissingExtra(ValueError):
    """A part of the report needs a package that is not installed."""


def loss_curves(metrics: Iterable[dict[str, Any]], window: int) -> dict[str, dict[str, Curve]]:
    """Model -> path -> mean losses over `window` inner steps of completed tasks; replicas of a path are averaged."""
    losses: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for metric in metrics:
        if metric["kind"] == "TRAIN":
            of_path = losses[metric["model"]][metric["path"]]
            for offset, loss in enumerate(metric["step_losses"]):
                of_path[(metric["first_step"] + offset) // window].append(loss)
    return {
        model: {
            path: [((index + 1) * window, sum(values) / len(values)) for index, values in sorted(windows.items())]
            for path, windows in sorted(paths.items())
        }
        for model, paths in losses.items()
    }


def draw(curves: dict[str, dict[str, Curve]]) -> bytes:
    """PNG of all curves, the mixture's paths in colour, other models in grey; raises MissingExtra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("loss curves need matplotlib: pip install 'dipaco[report]'") from None
    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    greys = {"base": "0.75", "dense": "0.25"}
    for model, paths in curves.items():
        for path, curve in paths.items():
            steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
            if model == "mixture":
                axes.plot(steps, losses, linewidth=1.0, label=f"path {path}")
            else:
                axes.plot(steps, losses, linewidth=1.6, color=greys.get(model, "0.5"), label=model, linestyle="--")
    axes.set_xlabel("inner step of the path")
    axes.set_ylabel("training loss, nats per token")
    axes.grid(alpha=0.25)
    if sum(len(paths) for paths in curves.values()) <= 24:
        axes.legend(ncols=2, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
