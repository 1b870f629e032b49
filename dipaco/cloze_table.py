"""A cloze as a terminal shows it: accuracies of all models and routes, overall, and by domain below."""

from __future__ import annotations

from typing import Any

from dipaco.cloze_score import KEYS
from dipaco.table import cell


def rows(values: dict[str, Any]) -> dict[str, float | None]:
    """The values of one key by model and route, models of one path first."""
    named = {name: value for name, value in values.items() if not isinstance(value, dict)}
    routed = ((name, by_route) for name, by_route in values.items() if isinstance(by_route, dict))
    return named | {f"{name} {route}": value for name, by_route in routed for route, value in by_route.items()}


def cloze_table(found: dict[str, Any]) -> Any:
    """As a rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    by_key = {key: rows(found[key]) for key in KEYS}
    names = list(by_key["accuracy"])
    overall = Table(
        title=f"true ending found among four ({found['split']}, {found['items']:,} items of {found['documents']:,} "
        f"documents; {found['context_tokens']} tokens of context, endings of {found['ending_tokens']})",
        title_justify="left",
    )
    overall.add_column("model and route", no_wrap=True)
    for column in ("by likelihood", "standard error", "by gain", "standard error"):
        overall.add_column(column, justify="right")
    for name in names:
        overall.add_row(name, *(cell(by_key[key][name], ".1%") for key in KEYS))
    overall.add_row("guessing", cell(found["chance"], ".1%"), "", cell(found["chance"], ".1%"), "")
    domains = Table(title="by gain, by domain", title_justify="left")
    domains.add_column("domain", no_wrap=True)
    for column in ("items", *names):
        domains.add_column(column, justify="right")
    for domain, each in found["per_domain"].items():
        gained = rows(each["gain_accuracy"])
        shares = (cell(gained[name], ".0%") for name in names)
        domains.add_row(domain, f"{each['items']:,}", *shares)
    left_out = found["left_out"]
    more = [Text(f"left out, with too few documents that are long enough: {', '.join(left_out)}")] if left_out else []
    return Group(overall, domains, *more)
