"""The results of the experiment's tables, from whatever cells are finished: rows for results.json, means and spreads.

A result row has `table`, `row`, `levels`, `seed`, `budget`, `route`, `test_perplexity`, `validation_perplexity`,
`bits_per_byte` (test), `ratio_to_dense` (test perplexity over that of the table's reference row of the same seed and
budget), `tokens` (trained on, the base's included), `learning_rate`, `parameters` (of all modules), `path_parameters`,
`bytes_saved` (what exchanging every gradient would have moved, over what was moved by the whole run, early stopping
included), `smallest_shard` and `least_used_path` (of the training tokens, of the test tokens: its share times their
number), `config_digest`, `weights_digest`, `wall_s`, `no_number` (why training diverged), `cloze_accuracy` and
`cloze_gain_accuracy` with their standard errors, `cloze_by_domain` (both accuracies, by the route of comparison alone),
`cloze_items` (their digest), and `headline`: chosen on validation. A number that is none is null.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipaco.cloze_score import KEYS
from scripts.experiment_cloze import FoundCloze
from scripts.experiment_cost import TEST, VALIDATION
from scripts.experiment_measurement import Measurement, asked
from scripts.experiment_plan import Cell, TablePlan
from scripts.experiment_table import DIPACO, MIXTURES, Row, routes_of

ResultRow = dict[str, Any]
Measured = Callable[[str], Measurement | None]
_MOVED = ("modules", "outer_gradients", "inner_state", "checkpoints")
_OF_A_RUN = (
    "tokens",
    "parameters",
    "path_parameters",
    "bytes_saved",
    "smallest_shard",
    "least_used_path",
    "wall_s",
    "config_digest",
    "weights_digest",
)
_SHOWN = 8
CLOZE_KEYS = tuple(f"cloze_{key}" for key in KEYS)


class WouldBeLost(ValueError):
    """Results stand where they would be overwritten by fewer."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean of so many values, and their standard deviation (over n - 1) where there are several."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def text(self, form: str) -> str:
        """As a table shows it."""
        shown = format(self.mean, form)
        return shown if self.deviation is None else f"{shown} ± {format(self.deviation, form)}"


def is_finished(cell: Cell, measured: Measured) -> bool:
    """Whether everything that the table shows of a cell is measured."""
    known = measured(cell.digest)
    return known is not None and all(known.holds(split, cell.routes) for split in cell.splits)


def result_rows(plan: TablePlan, measured: Measured) -> list[ResultRow]:
    """One row a finished cell and route, in the order of the table."""
    table = plan.table
    finished = [(row, cell) for row, cell in plan.reported() if not cell.provisional and is_finished(cell, measured)]
    dense = {
        (cell.seed, cell.budget): _perplexity(plan, row, cell, measured, TEST, None)
        for row, cell in finished
        if row.name == table.reference
    }
    chosen = _headline_pairs(plan)
    return [
        _result(plan, row, cell, route, measured, dense.get((cell.seed, cell.budget)), (row.name, route) in chosen)
        for row, cell in finished
        for route in routes_of(table, row, cell.config)
    ]


def missing(plan: TablePlan, measured: Measured) -> list[Cell]:
    """The reported cells that are not finished, provisional ones among them."""
    cells = [cell for _, cell in plan.reported()]
    return [cell for cell in cells if cell.provisional or not is_finished(cell, measured)]


def _headline_pairs(plan: TablePlan) -> set[tuple[str, str]]:
    """(row, route) that validation chose: the row by the route of comparison, and by the best of the others."""
    row, route = plan.headline_row(), plan.headline_route()
    if row is None or not row.made:
        return set()
    chosen = plan.table.row(row.value)
    pairs = {(row.value, (chosen.routes or plan.table.routes)[0])}
    return pairs | {(row.value, route.value)} if route is not None and route.made else pairs


def _perplexity(
    plan: TablePlan, row: Row, cell: Cell, measured: Measured, split: str, route: str | None
) -> float | None:
    known = measured(cell.digest)
    route = route or routes_of(plan.table, row, cell.config)[0]
    found = None if known is None else known.perplexity(split, row.model, route)
    return found if found is not None and math.isfinite(found) else None


def _result(
    plan: TablePlan, row: Row, cell: Cell, route: str, measured: Measured, dense: float | None, headline: bool
) -> ResultRow:
    known = measured(cell.digest)
    assert known is not None
    test = _perplexity(plan, row, cell, measured, TEST, route)
    return {
        "table": plan.table.name,
        "row": row.name,
        "levels": plan.table.levels,
        "seed": cell.seed,
        "budget": cell.budget,
        "route": route,
        "test_perplexity": test,
        "validation_perplexity": _perplexity(plan, row, cell, measured, VALIDATION, route),
        "bits_per_byte": known.bits_per_byte(TEST, row.model, route),
        "ratio_to_dense": test / dense if test and dense else None,
        "learning_rate": cell.learning_rate,
        **_cloze(plan, row, cell, route, known.cloze),
        **(dict.fromkeys(_OF_A_RUN) if known.no_number else _of_a_run(known, row, route)),
        "no_number": known.no_number or None,
        "headline": headline,
    }


def _cloze(plan: TablePlan, row: Row, cell: Cell, route: str, found: FoundCloze | None) -> ResultRow:
    """What a result row says of the table's cloze; nulls where it was not asked yet, or has no answer by the route."""
    result: ResultRow = dict.fromkeys((*CLOZE_KEYS, "cloze_by_domain", "cloze_items"))
    cloze = plan.table.cloze
    if cloze is None or found is None or not found.answers(cloze, TEST, []):
        return result
    routes = asked([route], cell.config.experiment)
    numbers = found.numbers(row.model, routes)
    if numbers is None:
        return result
    result |= {f"cloze_{key}": value for key, value in numbers.items()} | {"cloze_items": found.items_digest}
    if route == routes_of(plan.table, row, cell.config)[0]:
        domains = found.by_domain(row.model, routes).items()
        result["cloze_by_domain"] = {each: [part["accuracy"], part["gain_accuracy"]] for each, part in domains}
    return result


def _of_a_run(known: Measurement, row: Row, route: str) -> ResultRow:
    """What a result row says of a finished run beside its perplexities."""
    reused = known.run.get("reused_tasks", 0)  # nothing is fetched for these, and they take no time
    moved = sum(known.run["wire_bytes"].get(kind, 0) for kind in _MOVED)
    shards, load = known.run["shards"], known.path_load(row.model, route)
    values = (
        known.run["tokens"].get(DIPACO if row.model in MIXTURES else row.model),
        known.run["parameters"],
        known.run["path_parameters"],
        known.run["every_step_bytes"] / moved if moved and not reused else None,
        min(shards) * len(shards),
        min(load) * len(load) if load else None,
        None if reused else known.run["wall_s"],
        known.run["config_digest"],
        known.run["digest"],
    )
    return dict(zip(_OF_A_RUN, values, strict=True))


def spread_of(rows: Iterable[ResultRow], key: str) -> Spread | None:
    """Over the rows that have the number; None where none has."""
    values = [row[key] for row in rows if row[key] is not None]
    return Spread.of(values) if values else None


def only(rows: Iterable[ResultRow], **wanted: Any) -> list[ResultRow]:
    """The rows in which every named key has the wanted value."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def paired_difference(rows: Sequence[ResultRow], others: Sequence[ResultRow], key: str) -> Spread | None:
    """A number less that of another row, seed by seed; None where no seed has both."""
    of_seed = {row["seed"]: row[key] for row in others}
    pairs = [(row[key], of_seed.get(row["seed"])) for row in rows]
    differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
    return Spread.of(differences) if differences else None


def paired_ratio(rows: Sequence[ResultRow], others: Sequence[ResultRow]) -> Spread | None:
    """Test perplexity over that of another row, seed by seed; None where no seed has both."""
    of_seed = {row["seed"]: row["test_perplexity"] for row in others}
    pairs = [(row["test_perplexity"], of_seed.get(row["seed"])) for row in rows]
    ratios = [mine / other for mine, other in pairs if mine and other]
    return Spread.of(ratios) if ratios else None


def check_tables_are_given(results: Path, tables: Iterable[str]) -> None:
    """Raises WouldBeLost where results.json holds rows of a table that is not among those to be written."""
    others = sorted({str(row.get("table")) for row in _published(results)} - set(tables))
    if others:
        raise WouldBeLost(
            f"{results} also holds results of table {', '.join(others)}; name that table, too, or take another --out"
        )


def check_nothing_is_lost(results: Path, plans: Sequence[TablePlan], rows: Iterable[ResultRow]) -> None:
    """Raises WouldBeLost where results.json holds what `rows` lack: of another table, or what its table still asks for.

    What a table asks for no more (a row, seed, budget or route that it had) may go.
    """
    check_tables_are_given(results, [plan.table.name for plan in plans])
    wanted = {(plan.table.name, *key) for plan in plans for key in plan.wanted()}
    wanted -= set(map(_key, rows))
    lost = [key for key in map(_key, _published(results)) if key in wanted]
    if lost:
        names = list(dict.fromkeys(f"{table}/{row} seed {seed} {budget}" for table, row, seed, budget, _ in lost))
        shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
        raise WouldBeLost(
            f"{results} holds {len(lost)} results that are asked for and not finished in this --work: {shown}; give "
            "the --work in which they are, or the same command until they are finished here, or take another --out"
        )


def _key(row: ResultRow) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("table", "row", "seed", "budget", "route"))


def _published(results: Path) -> list[ResultRow]:
    """The rows of results.json; none where there is no such file, or it is no list of rows."""
    try:
        rows = json.loads(results.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
