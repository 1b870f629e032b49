"""The report as a terminal shows it: a table of perplexities, what it cost, and routed examples."""

from __future__ import annotations

from typing import Any

from dipaco.early_stopping import early_stopping_line
from dipaco.examples import Continuation
from dipaco.progress import duration

DIPACO = "dipaco"


def rows(report: dict[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    """(model and route, perplexity, share of the dense baseline's, bits per byte) of a report, dense models first."""
    perplexity, bits = report["perplexity"], report.get("bits_per_byte", {})
    dense = perplexity.get("dense")
    named = [(name, value, bits.get(name)) for name, value in perplexity.items() if not isinstance(value, dict)]
    named += [
        (f"{name} {route}", value, bits.get(name, {}).get(route))
        for name, by_route in perplexity.items()
        if isinstance(by_route, dict)
        for route, value in by_route.items()
    ]
    return [(name, value, value / dense if value and dense else None, bits_of) for name, value, bits_of in named]


def evaluation_table(found: dict[str, Any]) -> Any:
    """Perplexities of all models and routes, overall, and by domain below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    measured = rows(found)
    split = f"{found['split']}, {found['tokens']['evaluated']:,} tokens"
    overall = Table(title=f"perplexity of held-out text ({split})", title_justify="left")
    overall.add_column("model and route", no_wrap=True)
    for column in ("perplexity", "of dense", "bits per byte"):
        overall.add_column(column, justify="right")
    for name, value, share, bits in measured:
        overall.add_row(name, cell(value, ".3f"), cell(share, ".3f"), cell(bits, ".4f"))
    domains = Table(title="by domain", title_justify="left")
    domains.add_column("domain", no_wrap=True)
    for name, *_ in measured:
        domains.add_column(name, justify="right")
    for domain, perplexity in found["per_domain"].items():
        domains.add_row(domain, *(cell(value, ".2f") for _, value, _, _ in rows({"perplexity": perplexity})))
    accuracy = accuracy_line(found)
    return Group(overall, *([Text(accuracy)] if accuracy else []), domains)


def accuracy_line(found: dict[str, Any]) -> str:
    """How often each route takes the path that was best, in one line; empty where nothing chose."""
    shares = ", ".join(f"{route} {share:.1%}" for route, share in found.get("route_accuracy", {}).items())
    return f"tokens routed as the oracle of the same interval does: {shares}" if shares else ""


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
        *([early_stopping_line(report["early_stopping"])] if report.get("early_stopping") else []),
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


def cell(value: float | None, form: str) -> str:
    """A number as a table shows it; nothing where there is none."""
    return "" if value is None else format(value, form)
