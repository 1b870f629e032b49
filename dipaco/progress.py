"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere.

Reads statuses, decides nothing. The keys of a status are documented in coordinator/status.py; `faults` is a remark that
a simulation adds.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any, Protocol

Status = dict[str, Any]


class Display(Protocol):
    """Shows the newest status and passing remarks until it is left."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, status: Status) -> None: ...

    def say(self, line: str) -> None: ...


def display() -> Display:
    """The one that suits standard output."""
    return LivePanel() if sys.stdout.isatty() else PlainLines()


class PlainLines:
    """A line when a stage or phase begins, and every `period_s` seconds in between."""

    def __init__(self, period_s: float = 10.0, *, to_stderr: bool = False) -> None:
        self._period_s = period_s
        self._to_stderr = to_stderr
        self._said_s = float("-inf")
        self._place: tuple[Any, ...] = ()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, status: Status) -> None:
        place, now = (status["stage"], status["phase"], bool(status.get("waiting"))), time.monotonic()
        if place != self._place or now - self._said_s >= self._period_s:
            self._place, self._said_s = place, now
            self.say(summary(status))

    def say(self, line: str) -> None:
        with suppress(OSError):  # an output that cannot be written (a full disk, a closed pipe) ends no run
            print(line, file=sys.stderr if self._to_stderr else sys.stdout, flush=True)


class LivePanel:
    """Stages, workers and losses, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LivePanel:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, status: Status) -> None:
        self._live.update(panel(status))

    def say(self, line: str) -> None:
        with suppress(OSError):
            self._console.print(line, markup=False, highlight=False)


def summary(status: Status) -> str:
    """The whole status in one line."""
    running = [stage for stage in status["stages"] if stage["status"] == "running"]
    stages = ", ".join(f"{stage['name']} {stage['done']}/{stage['total']}" for stage in running)
    parts = [stages or ("finished" if status["finished"] else "starting")]
    if status["num_phases"] and any(stage["kind"] == "train" for stage in running):
        parts.append(f"phase {status['phase']}/{status['num_phases']}")
    if status["losses"]:
        parts.append("loss " + " ".join(f"{path}={loss:.3f}" for path, loss in _some(status["losses"])))
    for model, loss in status.get("baseline_losses", {}).items():
        parts.append(f"{model}={loss:.3f}")
    parts.append(f"{tokens_per_s(status):,.0f} tokens/s")
    parts.append(f"{_megabytes(sum(status['bytes'].values()))} moved")
    leased = [worker for worker in status["workers"] if worker["task"]]
    parts.append(f"{len(leased)}/{len(status['workers'])} workers busy")
    if "faults" in status:
        parts.append(status["faults"])
    if status["eta_s"] is not None and not status["finished"]:
        parts.append(f"about {duration(status['eta_s'])} of training left")
    if status.get("waiting"):
        parts.append(status["waiting"])
    parts += distrust(status)
    if status["paused"]:
        parts.append(f"PAUSED: {status['paused']}")
    return " | ".join(parts)


def panel(status: Status) -> Any:
    """The whole status as a rich renderable."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    stages = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in (("stage", "left"), ("", "left"), ("done", "right"), ("seconds", "right")):
        stages.add_column(column, justify=justify)  # type: ignore[arg-type]
    for stage in status["stages"]:
        share = stage["done"] / stage["total"] if stage["total"] else float(stage["status"] == "done")
        seconds = stage["seconds"] or (time.time() - stage["started_s"] if stage["status"] == "running" else 0.0)
        stages.add_row(
            stage["name"], _bar(share), f"{stage['done']}/{stage['total']}", f"{seconds:.0f}" if seconds else ""
        )
    workers = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in (("worker", "left"), ("task", "left"), ("step", "right"), ("loss", "right")):
        workers.add_column(column, justify=justify)  # type: ignore[arg-type]
    for worker in status["workers"]:
        steps = f"{worker['steps']}/{worker['steps_total']}" if worker["steps_total"] else str(worker["steps"] or "")
        loss = worker["loss"]
        shown = f"{loss:.3f}" if loss is not None and loss == loss else ""
        workers.add_row(worker["name"], worker["task"] or "waiting", steps, shown)
    losses = "  ".join(f"{path}: {loss:.3f}" for path, loss in _some(status["losses"]))
    parts: list[Any] = [stages, workers]
    if losses:
        parts.append(Text(f"loss by path  {losses}"))
    if status.get("baseline_losses"):
        parts.append(
            Text("loss of others  " + "  ".join(f"{m}: {x:.3f}" for m, x in status["baseline_losses"].items()))
        )
    moved = ", ".join(f"{name.replace('_', ' ')} {_megabytes(count)}" for name, count in status["bytes"].items())
    parts.append(Text(f"{tokens_per_s(status):,.0f} tokens/s   {status['tokens']:,} tokens trained   moved: {moved}"))
    if status["eta_s"] is not None and not status["finished"]:
        parts.append(Text(f"about {duration(status['eta_s'])} of training left"))
    if "faults" in status:
        parts.append(Text(status["faults"]))
    if status.get("waiting"):
        parts.append(Text(status["waiting"], style="bold yellow"))
    parts += [Text(line, style="bold red") for line in distrust(status)]
    if status["paused"]:
        parts.append(Text(f"paused: {status['paused']}", style="bold red"))
    phase = f", phase {status['phase']} of {status['num_phases']}" if status["num_phases"] else ""
    return Panel(Group(*parts), title=f"{status['run']}: {status['stage'] or 'finished'}{phase}", title_align="left")


def distrust(status: Status) -> list[str]:
    """Whose results are not believed, if anybody's."""
    lines = [f"banned: {', '.join(status['banned'])}"] if status.get("banned") else []
    if status.get("suspected"):
        lines.append("suspected: " + ", ".join(f"{name} ({len(t)})" for name, t in status["suspected"].items()))
    if status.get("quarantined"):
        lines.append(f"in quarantine: {', '.join(status['quarantined'])}")
    return lines + list(status.get("undecided", {}).values())


def tokens_per_s(status: Status) -> float:
    """Tokens a second of all workers together, in the tasks they hold now."""
    return float(sum(worker["tokens_per_s"] for worker in status["workers"] if worker["task"]))


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _some(losses: dict[str, float], most: int = 16) -> list[tuple[str, float]]:
    """At most so many paths, those with the highest losses."""
    if len(losses) <= most:
        return list(losses.items())
    return sorted(losses.items(), key=lambda item: -item[1])[:most]


def _bar(share: float, width: int = 20) -> str:
    full = round(width * min(1.0, share))
    return "█" * full + "░" * (width - full)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
