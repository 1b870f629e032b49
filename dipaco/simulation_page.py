"""simulation.html: the outcome of a run under faults, with a timeline picture; one file without links to anything."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from dipaco.curves import MissingExtra
from dipaco.faults import COORDINATOR, NETWORK_ACTIONS
from dipaco.simulation import HeldTask, Record, coordinator_absences, held_tasks, up_times

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; word-break: break-word; }
img { max-width: 100%; }
"""
COLOURS = {"completed": "#4c9f70", "lost": "#d1495b", "released": "#edae49"}
MARKS = {
    "kill": ("x", "black"),
    "ended": ("x", "red"),
    "stop": ("s", "purple"),
    "terminate": ("v", "black"),
    "drop": ("|", "blue"),
}


def page(outcome: Record, timeline_png: bytes | None) -> str:
    """The HTML; without a picture it says which extra draws it."""
    name = html.escape(str(outcome["run"]))
    lines = [(key, _shown(value)) for key, value in outcome.items() if key != "participation"]
    cells = "\n".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in lines)
    if timeline_png is None:
        picture = "<p>The timeline needs matplotlib: <code>pip install 'dipaco[report]'</code>.</p>"
    else:
        encoded = base64.b64encode(timeline_png).decode()
        picture = f"<img alt='timeline' src='data:image/png;base64,{encoded}'>"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name} under faults</title>"
        f"<style>{_STYLE}</style><h1>{name} under faults</h1>\n{picture}\n"
        "<p>Bars: leases (green: completed, red: lost with the worker, yellow: handed back) over the time in which the "
        "process lived (grey). Marks: x SIGKILL, square SIGSTOP, triangle SIGTERM, blue stroke: connections reset, "
        "blue bar: cut off from the coordinator. Below: workers alive and workers "
        f"with a task.</p>\n<table>{cells}</table></html>\n"
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
    return str(value)


def draw(
    events: Sequence[Record],
    faults: Sequence[Record],
    metrics: Sequence[Record],
    participation: Sequence[Sequence[float]],
    began_s: float,
    ended_s: float,
) -> bytes:
    """PNG of who lived, held what and was hit when; raises MissingExtra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the timeline needs matplotlib: pip install 'dipaco[report]'") from None
    links = [fault for fault in faults if fault["action"] in NETWORK_ACTIONS]
    marked, faults = faults, [fault for fault in faults if fault["action"] not in NETWORK_ACTIONS]
    alive, _ = up_times(events, faults, ended_s)
    workers = sorted(alive, key=lambda name: int(name.rpartition("-")[2]))
    figure = Figure(figsize=(12.0, 3.0 + 0.35 * len(workers)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[len(workers) + 1, 2])
    for row, worker in enumerate(workers):
        _bars(above, row, alive[worker], began_s, "0.85", height=0.9)
        for outcome, colour in COLOURS.items():
            of_worker = [h for h in held_tasks(events, faults, metrics, ended_s) if _is(h, worker, outcome)]
            _bars(above, row, [(held.begin_s, held.end_s) for held in of_worker], began_s, colour, height=0.6)
        _bars(
            above, row, _cut_off([link for link in links if link["process"] == worker], ended_s), began_s, "blue", 0.1
        )
    absences = [
        (fault["wall_s"], fault["wall_s"] + seconds)
        for fault, seconds in zip(
            [f for f in faults if f["process"] == COORDINATOR and f["action"] in ("kill", "ended")],
            coordinator_absences(events, faults),
            strict=True,
        )
    ]
    _bars(above, len(workers), [(began_s, ended_s)], began_s, "0.85", height=0.9)
    _bars(above, len(workers), absences, began_s, "white", height=0.9)
    rows = [*workers, COORDINATOR]
    for fault in marked:
        if fault["action"] in MARKS:
            mark, colour = MARKS[fault["action"]]
            above.plot(fault["wall_s"] - began_s, rows.index(fault["process"]), mark, color=colour, markersize=6)
    above.set_yticks(range(len(rows)), rows)
    seconds = [each[0] for each in participation]
    below.step(seconds, [each[1] for each in participation], where="post", color="0.5", label="alive")
    below.step(seconds, [each[2] for each in participation], where="post", color="#4c9f70", label="with a task")
    below.set_xlabel("seconds into the run")
    below.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _cut_off(links: Sequence[Record], ended_s: float) -> list[tuple[float, float]]:
    """The partitions of one worker; one that nothing ended lasts to the end."""
    found: list[tuple[float, float]] = []
    for link in links:
        if link["action"] == "part":
            found.append((link["wall_s"], ended_s))
        elif link["action"] == "heal" and found:
            found[-1] = (found[-1][0], link["wall_s"])
    return found


def _is(held: HeldTask, worker: str, outcome: str) -> bool:
    return held.worker == worker and held.outcome == outcome


def _bars(
    axes: Any, row: int, intervals: Sequence[tuple[float, float]], began_s: float, colour: str, height: float
) -> None:
    spans = [(begin - began_s, end - begin) for begin, end in intervals]
    axes.broken_barh(spans, (row - height / 2, height), facecolor=colour, edgecolor="white", linewidth=0.5)
