"""Pictures of a table: the ratio of every row, seed by seed, and the routes of the chosen one (matplotlib, late)."""

from __future__ import annotations

import io
from typing import Any

from dipaco.curves import MissingExtra
from scripts.experiment_page import Section
from scripts.experiment_results import ResultRow, only
from scripts.experiment_table import BASE_BUDGET

Points = list[tuple[str, list[float]]]
"""(label, a value a seed)."""


def draw(section: Section) -> bytes:
    """PNG of one table, empty where no ratio is known yet; raises MissingExtra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'dipaco[report]'") from None
    panels = [panel for panel in (_rows(section), _routes(section)) if panel[1]]
    if not panels:
        return b""
    heights = [len(points) for _, points in panels]
    figure = Figure(figsize=(7.0, 1.2 + 0.28 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    drawn = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)
    for axes, (title, points) in zip(drawn[:, 0], panels, strict=True):
        _panel(axes, title, points)
    drawn[-1, 0].set_xlabel(f"test perplexity, of {section.plan.table.reference}; a dot a seed, a stroke their mean")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90, metadata={"Software": None})
    return picture.getvalue()


def _rows(section: Section) -> tuple[str, Points]:
    finished = only(section.rows, budget=BASE_BUDGET)
    points = []
    for row in section.plan.table.rows:
        mine = only(finished, row=row.name)
        if mine:
            points.append((row.name, _ratios(only(mine, route=mine[0]["route"]))))
    return section.plan.table.levels, [point for point in points if point[1]]


def _routes(section: Section) -> tuple[str, Points]:
    chosen = section.plan.headline_row()
    if chosen is None or not chosen.made:
        return "", []
    mine = only(section.rows, row=chosen.value, budget=BASE_BUDGET)
    points = [(route, _ratios(only(mine, route=route))) for route in dict.fromkeys(row["route"] for row in mine)]
    return f"routes of {chosen.value}", [point for point in points if point[1]]


def _ratios(rows: list[ResultRow]) -> list[float]:
    return [row["ratio_to_dense"] for row in rows if row["ratio_to_dense"] is not None]


def _panel(axes: Any, title: str, points: Points) -> None:
    for place, (_, ratios) in enumerate(points):
        axes.plot(sum(ratios) / len(ratios), place, "|", color="C0", markersize=14, markeredgewidth=2)
        axes.plot(ratios, [place] * len(ratios), "o", color="C0", markersize=4, alpha=0.6)
    axes.axvline(1.0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(points)), [label for label, _ in points], fontsize="small")
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(alpha=0.25)
