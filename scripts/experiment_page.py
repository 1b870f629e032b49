"""results.md: the tables of the experiment as a person reads them; what is missing is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.experiment_cloze_page import cloze_domain_lines, cloze_lines, cloze_words
from scripts.experiment_plan import Cell, TablePlan
from scripts.experiment_results import ResultRow, only, paired_ratio, spread_of
from scripts.experiment_table import BASE_BUDGET, Row, configured

_HOW = """Perplexity of the test split, without the prefix that the router has seen, for every model alike. A ratio is
to the reference row of the same seed and budget; ± is the standard deviation over the seeds. Learning rate, reported
variant and its route were chosen on the validation split; the test split was only reported. Bytes saved: what an
exchange of every gradient at every step would have moved, over what was moved, inner state included. No number: a step
of its training was not finite; that counts as infinite where validation chooses, and in no mean."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """When and by which command the results were written, and the machines of the runs."""

    date: str
    command: str
    hardware: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Section:
    """One table with its finished rows; `picture` is the name of a file beside the page, empty without one."""

    plan: TablePlan
    rows: list[ResultRow]
    missing: list[Cell]
    picture: str = ""


def page(sections: Sequence[Section], circumstances: Circumstances) -> str:
    """The whole page."""
    lines = [
        "# Results",
        "",
        f"Written {circumstances.date} from runs on {'; '.join(map(_machine, circumstances.hardware))}, by",
        "",
        f"    {circumstances.command}",
        "",
        "which goes on with what is not finished.",
        "",
        _HOW,
    ]
    for section in sections:
        lines += ["", *_section(section)]
    return "\n".join(lines) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']} ({machine['cores']} cores, {machine['memory_gb']:g} GB, {machine['system']}, "
        f"Python {machine['python']})"
    )


def _section(section: Section) -> list[str]:
    table = section.plan.table
    lines = [f"## {table.title}", "", _what(section), ""]
    lines += _rows(section)
    parts = (_bytes, _headline, _routes, _cloze, _rates, _shards, _missing)
    for part in (each(section) for each in parts):
        lines += ["", *part] if part else []
    if section.picture:
        lines += ["", f"![{table.title}]({section.picture})"]
    return lines


def _what(section: Section) -> str:
    table, experiment = section.plan.table, section.plan.table.experiment
    pretrained = f"{experiment.pretrain.steps} + " if experiment.pretrain else ""
    steps = f"{pretrained}{experiment.phases * experiment.inner_steps}"
    tokens = experiment.inner.batch_rows * experiment.model.sequence_length
    seeds = ", ".join(str(seed) for seed in table.seeds)
    return (
        f"{table.name}.yaml: {steps} steps of up to {tokens:,} tokens, {experiment.inner_steps} "
        f"steps a phase; prefix {experiment.sharding.prefix_tokens} tokens; seeds {seeds}; ratios to "
        f"`{table.reference}`."
    )


def _rows(section: Section) -> list[str]:
    """The rows at the experiment's own budget, each by its first route."""
    table = section.plan.table
    head = [
        "row",
        "compute",
        "route",
        "parameters",
        "tokens",
        "test perplexity",
        "ratio",
        "bits per byte",
        "validation",
        "bytes saved",
        "seeds",
    ]
    body = []
    for row in table.rows:
        mine = only(section.rows, row=row.name, budget=BASE_BUDGET)
        if not mine:
            body.append([f"{row.label} (`{row.name}`)", row.compute, *["-"] * 8, "none"])
            continue
        first = only(mine, route=mine[0]["route"])
        body.append(
            [
                f"{row.label} (`{row.name}`)",
                row.compute,
                first[0]["route"],
                _count(first, "parameters"),
                _count(first, "tokens"),
                _text(first, "test_perplexity", ".2f"),
                _text(first, "ratio_to_dense", ".3f"),
                _text(first, "bits_per_byte", ".4f"),
                _text(first, "validation_perplexity", ".2f"),
                _text(first, "bytes_saved", ".1f"),
                _seeds(first),
            ]
        )
    return _table(head, body)


def _bytes(section: Section) -> list[str]:
    """Which rows' bytes hold what early stopping moved, be they of the last version or of the best one."""
    table, shown = section.plan.table, {row["row"] for row in section.rows}
    runs = {row.name: configured(table, row, table.seeds[0], BASE_BUDGET, None) for row in table.rows}
    names = [f"`{name}`" for name, run in runs.items() if name in shown and run.experiment.early_stopping is not None]
    if not names:
        return []
    return [
        f"Bytes saved of {' and '.join(names)}: these runs keep the best version of every path, and what early "
        "stopping moves to measure versions is counted among what was moved, also for a row of the last version."
    ]


def _headline(section: Section) -> list[str]:
    """The chosen variant at every budget, against dense and the references."""
    headline, chosen, route = section.plan.table.headline, section.plan.headline_row(), section.plan.headline_route()
    if headline is None or chosen is None:
        return []
    if not chosen.made:
        return ["Headline: not chosen yet; validation perplexities of candidates are missing."]
    routes = list(dict.fromkeys(row["route"] for row in only(section.rows, row=chosen.value, headline=True)))
    lines = [
        f"Headline, chosen on validation: `{chosen.value}`"
        + (f", routed by `{route.value}`." if route is not None and route.made else "."),
        "",
    ]
    others = [name for name in headline.references if name != section.plan.table.reference]
    body = []
    for budget in (BASE_BUDGET, *headline.budgets):
        for each in routes:
            mine = only(section.rows, row=chosen.value, budget=budget, route=each)
            references = [paired_ratio(mine, only(section.rows, row=name, budget=budget)) for name in others]
            ratios = ["-" if ratio is None else ratio.text(".3f") for ratio in references]
            body.append([budget, each, _text(mine, "test_perplexity", ".2f"), _text(mine, "ratio_to_dense", ".3f")])
            body[-1] += [*ratios, _seeds(mine)]
    head = ["budget", "route", "test perplexity", f"to `{section.plan.table.reference}`"]
    return lines + _table([*head, *(f"to `{name}`" for name in others), "seeds"], body)


def _routes(section: Section) -> list[str]:
    """All routes of the chosen variant."""
    chosen = section.plan.headline_row()
    if chosen is None or not chosen.made:
        return []
    mine = only(section.rows, row=chosen.value, budget=BASE_BUDGET)
    body = []
    for route in dict.fromkeys(row["route"] for row in mine):
        rows = only(mine, route=route)
        body.append([route, _text(rows, "test_perplexity", ".2f"), _text(rows, "ratio_to_dense", ".3f")])
        body[-1] += [_text(rows, "bits_per_byte", ".4f"), _text(rows, "validation_perplexity", ".2f")]
    head = ["route", "test perplexity", "ratio", "bits per byte", "validation"]
    return [f"Routes of `{chosen.value}`:", "", *_table(head, body)]


def _cloze(section: Section) -> list[str]:
    """Every row, then the compared ones by domain."""
    lines = cloze_words(section.plan, section.rows)
    for head, *body in filter(
        None, (cloze_lines(section.plan, section.rows), cloze_domain_lines(section.plan, section.rows))
    ):
        lines += ["", *_table(head, body)]
    return lines


def _rates(section: Section) -> list[str]:
    tune = section.plan.table.tune
    if tune is None:
        return []
    rows = {row.tuned_as: row for row in section.plan.table.rows if row.tuned_as}
    said = [_rate(section, choice, rows[choice]) for choice in tune.choices if choice in rows]
    grid = ", ".join(f"{rate:g}" for rate in tune.learning_rates)
    return [f"Learning rates, chosen on validation with seed {tune.seed} among {grid}: {'; '.join(said)}."]


def _rate(section: Section, choice: str, row: Row) -> str:
    rate = section.plan.learning_rate(row)
    remarks = ["at the edge of the grid"] if rate.made and rate.at_edge else []
    if rate.no_number:
        remarks.append(f"no number at {' and '.join(f'{each:g}' for each in rate.no_number)}")
    said = f"{choice} {rate.value:g}" if rate.made else f"{choice} not chosen yet"
    return said + (f" ({'; '.join(remarks)})" if remarks else "")


def _shards(section: Section) -> list[str]:
    """Whether any shard starved, where there are several: its share against the fair one."""
    found = [row for row in section.rows if row["smallest_shard"] is not None and row["smallest_shard"] < 1.0]
    if not found:
        return []
    least = min(found, key=lambda row: row["smallest_shard"])
    said = (
        f"Smallest shard of all runs: {least['smallest_shard']:.2f} of its fair share "
        f"(`{least['row']}`, seed {least['seed']})."
    )
    loads = [
        row for row in section.rows if row["least_used_path"] is not None and not row["route"].startswith("oracle")
    ]
    if loads:
        least = min(loads, key=lambda row: row["least_used_path"])
        said += (
            f" Least used path on the test split: {least['least_used_path']:.2f} of its fair share "
            f"(`{least['row']}`, seed {least['seed']}, {least['route']})."
        )
    return [said]


def _missing(section: Section) -> list[str]:
    if not section.missing:
        return ["Every cell of this table is finished."]
    names = [f"`{name}`" for name in dict.fromkeys(_named(cell) for cell in section.missing)]
    return [f"Not finished, {len(names)} cells: {', '.join(names)}."]


def _named(cell: Cell) -> str:
    budget = "" if cell.budget == BASE_BUDGET else f" {cell.budget}"
    return f"{cell.rows[0].partition('/')[2]} {cell.seed}{budget}"


def _text(rows: Iterable[ResultRow], key: str, form: str) -> str:
    spread = spread_of(rows, key)
    return "-" if spread is None else spread.text(form)


def _count(rows: Iterable[ResultRow], key: str) -> str:
    """The first of the rows' counts; a run without a number has none."""
    return next((f"{row[key]:,}" for row in rows if row[key] is not None), "-")


def _seeds(rows: Iterable[ResultRow]) -> str:
    """All of them, and beside those whose training diverged that they are in no mean."""
    seeds = (f"{row['seed']} (no number)" if row["no_number"] else str(row["seed"]) for row in rows)
    return ", ".join(seeds) or "none"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in body]
