"""The report as a terminal shows it: a table of perplexities, what it cost, and routed examples. rich is imported late."""

from __future__ import annotations

from typing import Any

from dipaco.examples import Continuation
from dipaco.progress import duration

DIPACO = "dipaco"


def rows(report: dict[str, Any]) -> list[tuple[str, float, float | None, float | None]]:
    """(model and route, perplexity, share of the dense baseline's, bits per byte) of a report, dense models first."""
    perplexity, bits = report["perplexity"], report["bits_per_byte"]
    dense = perplexity.get("dense")
    named = [(name, value, bits.get(name)) for name, value in perplexity.items() if not isinstance(value, dict)]
    named += [
        (f"{name} {route}", value, bits.get(name, {}).get(route))
        for name, by_route in perplexity.items()
        if isinstance(by_route, dict)
        for route, value in by_route.items()
    ]
    return [(name, value, value / dense if dense else None, bits_of) for name, value, bits_of in named]


def evaluation_table(found: dict[str, Any]) -> Any:
    """Perplexities of all models and routes, overall and by domain."""
    from rich.table import Table

    domains = list(found.get("per_domain", {}))
    table = Table(title=f"held-out perplexity, {found['tokens']['evaluated']:,} tokens", title_justify="left")
    table.add_column("model and route")
    for column in ("perplexity", "of dense", "bits per byte", *domains):
        table.add_column(column, justify="right")
    by_domain = {domain: {row[0]: row[1] for row in rows(found["per_domain"][domain])} for domain in domains}
    for name, value, share, bits in rows(found):
        cells = [f"{value:.2f}", _or_empty(share, ".3f"), _or_empty(bits, ".3f")]
        table.add_row(name, *cells, *(_or_empty(by_domain[domain].get(name), ".2f") for domain in domains))
    return table


def report_table(report: dict[str, Any]) -> Any:
    """The whole report of a run."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    if report["perplexity"]:
        parts.append(evaluation_table(report))
    moved = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:,.1f} MB" for name, count in report["wire_bytes"].items())
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in report["stages"].items())
    lines = [
        f"trained on {report['tokens']['trained']:,} tokens; moved {moved}",
        f"wall time {duration(report['wall_s'])} ({stages})",
        f"peak memory of all processes {report['peak_rss_mb']:,.0f} MB",
        f"weights {report['digest']}",
    ]
    return Group(*parts, Text("\n".join(lines)))


def example_text(example: Continuation) -> Any:
    """A prompt, what the model made of it, and the paths that made it."""
    from rich.text import Text

    return Text.assemble(
        (f"\npath {' > '.join(example.paths)}\n", "bold cyan"), (example.prompt, "dim"), (example.text, "bold")
    )


def _or_empty(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
