"""The cloze of a table as results.md shows it: every row against the reference, the chosen one by domain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dipaco.cloze_items import CHANCE
from scripts.experiment_plan import TablePlan
from scripts.experiment_results import ResultRow, Spread, only, paired_difference, spread_of
from scripts.experiment_table import BASE_BUDGET

Line = Sequence[str]
"""The cells of a line of a markdown table, its head first."""


def cloze_words(plan: TablePlan, rows: list[ResultRow]) -> list[str]:
    """What was asked and how it is to be read; what is missing is said. Empty where the table asks for none."""
    cloze = plan.table.cloze
    if cloze is None:
        return []
    answered = _answered(rows)
    said = (
        f"Cloze: the true ending of a test text among four, the others from the same place of other documents of its "
        f"domain; at most {cloze.items:,} items of {cloze.context_tokens} tokens of context and "
        f"{cloze.ending_tokens} of ending, by the route that the context chooses. Found as the likeliest, or by gain: "
        f"as the one that the context makes likelier by most. Guessing finds {CHANCE:.1%}; ± is over the seeds, the "
        f"error that of the items of one seed, those of a document taken together; points are differences to "
        f"`{plan.table.reference}` of the same seed. Reported only."
    )
    if not answered:
        return [f"{said} Not measured yet."]
    lacking = sorted({row["row"] for row in rows if row["budget"] == BASE_BUDGET and not row["no_number"]})
    lacking = [name for name in lacking if not only(answered, row=name)]
    if lacking:
        said += f" Not measured yet: {', '.join(f'`{name}`' for name in lacking)}."
    if len({row["cloze_items"] for row in answered}) > 1:
        said += " Not all rows were asked the same items."
    return [said]


def cloze_lines(plan: TablePlan, rows: list[ResultRow]) -> list[Line]:
    """Every row by its first route that was asked, and the chosen one by all of them; empty without an answer."""
    answered = _answered(rows)
    dense = only(answered, row=plan.table.reference)
    chosen = plan.headline_row()
    lines: list[Line] = []
    for row in plan.table.rows:
        mine = only(answered, row=row.name)
        routes = list(dict.fromkeys(each["route"] for each in mine))
        if chosen is None or not chosen.made or chosen.value != row.name:
            routes = routes[:1]
        for route in routes:
            found = only(mine, route=route)
            line = [f"{row.label} (`{row.name}`)", route, _plain(spread_of(found, "ratio_to_dense"), ".3f")]
            for key in ("cloze_accuracy", "cloze_gain_accuracy"):
                error = spread_of(found, key.replace("accuracy", "standard_error"))
                line += [_percent(spread_of(found, key)), "-" if error is None else f"{100 * error.mean:.1f}"]
                line += [_points(paired_difference(found, dense, key))]
            lines.append([*line, ", ".join(str(each["seed"]) for each in found)])
    head = ["row", "route", "perplexity ratio", "likeliest", "error", "points", "by gain", "error", "points", "seeds"]
    return [head, *lines] if lines else []


def cloze_domain_lines(plan: TablePlan, rows: list[ResultRow]) -> list[Line]:
    """The reference, the headline's references and the chosen row by domain: likeliest / by gain, mean of the seeds."""
    headline, chosen = plan.table.headline, plan.headline_row()
    names = [plan.table.reference, *(headline.references if headline else [])]
    names += [chosen.value] if chosen is not None and chosen.made else []
    parts = {
        name: [row["cloze_by_domain"] for row in only(_answered(rows), row=name) if row["cloze_by_domain"]]
        for name in dict.fromkeys(names)
    }
    shown = {name: found for name, found in parts.items() if found}
    domains = sorted({domain for found in shown.values() for each in found for domain in each})
    lines = [[domain, *(_of_domain(found, domain) for found in shown.values())] for domain in domains]
    return [["domain", *(f"`{name}`" for name in shown)], *lines] if lines else []


def _answered(rows: Iterable[ResultRow]) -> list[ResultRow]:
    return [row for row in only(rows, budget=BASE_BUDGET) if row["cloze_accuracy"] is not None]


def _of_domain(found: list[dict[str, list[float]]], domain: str) -> str:
    pairs = [each[domain] for each in found if domain in each]
    means = (100 * sum(values) / len(values) for values in zip(*pairs, strict=True))
    return " / ".join(f"{mean:.0f}" for mean in means) or "-"


def _plain(spread: Spread | None, form: str) -> str:
    return "-" if spread is None else spread.text(form)


def _percent(spread: Spread | None) -> str:
    return "-" if spread is None else f"{_hundredfold(spread).text('.1f')} %"


def _points(spread: Spread | None) -> str:
    return "-" if spread is None else _hundredfold(spread).text("+.1f").replace("± +", "± ")


def _hundredfold(spread: Spread) -> Spread:
    deviation = None if spread.deviation is None else 100 * spread.deviation
    return Spread(100 * spread.mean, deviation, spread.count)
