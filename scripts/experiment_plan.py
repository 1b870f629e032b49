"""The cells of a table: which runs it asks for, and what validation has chosen so far. Pure.

A cell is one run: a row, a seed and a budget at the learning rate that the grid chose. Cells of equal digests are one
run, whatever rows and tables ask for them. A cell that hangs on a choice not made yet is `provisional`: it is listed
with what it may cost, and never run. The test split is asked for only where a row is reported, never for the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, TypeVar

from configs.load import experiment_digest
from configs.schema import Config
from scripts.experiment_cloze import Cloze
from scripts.experiment_cost import TEST, VALIDATION, cloze_seconds, core_seconds
from scripts.experiment_measurement import Measurement, asked
from scripts.experiment_table import BASE_BUDGET, Headline, Row, Table, configured, routes_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """What validation chose; until it is `made` the value stands in for it. `no_number`: what never counted as one."""

    value: T
    made: bool
    at_edge: bool = False
    no_number: tuple[T, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. `data` is the digest of what it reads, `rows` are its names as table/row, `routes` in the words of
    `dipaco evaluate`, `splits` those to measure. `core_s` includes the `cloze_s` of its cloze on the test split."""

    digest: str
    config: Config
    data: str
    rows: tuple[str, ...]
    seed: int
    budget: str
    learning_rate: float
    routes: tuple[str, ...]
    splits: tuple[str, ...]
    core_s: float
    provisional: bool
    cloze: Cloze | None = None
    cloze_s: float = 0.0

    @property
    def name(self) -> str:
        budget = "" if self.budget == BASE_BUDGET else f" {self.budget} budget"
        return f"{self.rows[0]} seed {self.seed}{budget} lr {self.learning_rate:g}"


def cell_digest(config: Config, data: str) -> str:
    """What a cell is known by: its experiment, and the digest of the text that it reads."""
    return experiment_digest(config, {"data": data})


class TablePlan:
    """The cells of one table, given what is measured of a digest. `data` is the digest of the text that is read."""

    def __init__(self, table: Table, data: str, measured: Callable[[str], Measurement | None]) -> None:
        self.table, self._data, self._measured = table, data, measured
        self._config = cache(self._configured)

    def _configured(self, row: str, seed: int, budget: str, learning_rate: float | None) -> tuple[Config, str]:
        config = configured(self.table, self.table.row(row), seed, budget, learning_rate)
        return config, cell_digest(config, self._data)

    # --- choices, on the validation split alone -----------------------------------------------------------------------

    def learning_rate(self, row: Row) -> Choice[float]:
        """The learning rate of a row: the best of the grid for the row that tunes it; without a grid its own."""
        tune = self.table.tune
        own = self._config(row.name, self.table.seeds[0], BASE_BUDGET, None)[0].experiment.inner.learning_rate
        if tune is None or row.tuned_as is None:
            return Choice(own, True)
        tuning = self.table.row(tune.choices[row.tuned_as])
        losses = {rate: self._validation(tuning, tune.seed, BASE_BUDGET, rate) for rate in tune.learning_rates}
        best, infinite = _lowest(losses), tuple(rate for rate, loss in losses.items() if loss == math.inf)
        if best is None:
            return Choice(own, False, no_number=infinite)
        edges = (min(losses), max(losses)) if len(losses) > 1 else ()
        return Choice(best, True, at_edge=best in edges, no_number=infinite)

    def headline_row(self) -> Choice[str] | None:
        """The candidate with the lowest mean over the table's seeds, each by its first route."""
        headline = self.table.headline
        if headline is None:
            return None
        means = {name: self._mean_validation(self.table.row(name), None) for name in headline.candidates}
        best = _lowest(means)
        return Choice(headline.candidates[0], False) if best is None else Choice(best, True)

    def headline_route(self) -> Choice[str] | None:
        """The route with the lowest mean over the table's seeds, of those by which the chosen row is measured."""
        headline, chosen = self.table.headline, self.headline_row()
        if headline is None or chosen is None:
            return None
        row = self.table.row(chosen.value)
        known = routes_of(self.table, row, self._config(row.name, self.table.seeds[0], BASE_BUDGET, None)[0])
        routes = [route for route in headline.routes if route in known]
        best = _lowest({route: self._mean_validation(row, route) for route in routes}) if chosen.made else None
        if best is not None:
            return Choice(best, True)
        return Choice(routes[0], False) if routes else None

    def _mean_validation(self, row: Row, route: str | None) -> float | None:
        rate = self.learning_rate(row)
        values = [self._validation(row, seed, BASE_BUDGET, rate.value, route) for seed in self.table.seeds]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if rate.made and len(known) == len(values) else None

    def _validation(self, row: Row, seed: int, budget: str, rate: float, route: str | None = None) -> float | None:
        config, digest = self._config(row.name, seed, budget, rate)
        measurement = self._measured(digest)
        route = route or routes_of(self.table, row, config)[0]
        return None if measurement is None else measurement.perplexity(VALIDATION, row.model, route)

    # --- cells --------------------------------------------------------------------------------------------------------

    def cell(self, row: Row, seed: int, budget: str, rate: Choice[float], splits: tuple[str, ...]) -> Cell:
        config, digest = self._config(row.name, seed, budget, rate.value)
        routes = tuple(asked(routes_of(self.table, row, config), config.experiment))
        cost, frozen, experiment = self.table.cost, self.table.experiment, config.experiment
        cloze = self.table.cloze if TEST in splits else None
        cloze_s = cloze_seconds(cost, frozen, experiment, cloze)
        return Cell(
            digest=digest,
            config=config,
            data=self._data,
            rows=(f"{self.table.name}/{row.name}",),
            seed=seed,
            budget=budget,
            learning_rate=rate.value,
            routes=routes,
            splits=splits,
            core_s=core_seconds(cost, frozen, experiment, splits) + cloze_s,
            provisional=not rate.made,
            cloze=cloze,
            cloze_s=cloze_s,
        )

    def reported(self) -> Iterator[tuple[Row, Cell]]:
        """The cells that the table shows: every row with the table's seeds, and the headline's beside them."""
        shown = (VALIDATION, TEST)
        for seed in self.table.seeds:
            for row in self.table.rows:
                yield row, self.cell(row, seed, BASE_BUDGET, self.learning_rate(row), shown)
        headline, chosen = self.table.headline, self.headline_row()
        if headline is None or chosen is None:
            return
        named = {name: Choice(name, True) for name in headline.references} | {chosen.value: chosen}
        for budget, seed in self._beside(headline):
            for name, choice in named.items():
                row = self.table.row(name)
                cell = self.cell(row, seed, budget, self.learning_rate(row), shown)
                yield row, replace(cell, provisional=cell.provisional or not choice.made)

    def _beside(self, headline: Headline) -> list[tuple[str, int]]:
        """(budget, seed) at which the table shows the headline and its references besides."""
        more = [(BASE_BUDGET, seed) for seed in headline.seeds if seed not in self.table.seeds]
        return more + [(budget, seed) for budget in headline.budgets for seed in headline.budget_seeds]

    def wanted(self) -> set[tuple[str, int, str, str]]:
        """(row, seed, budget, route) of every result that the table asks for, finished or not.

        While the headline is not chosen, what is measured besides is asked of every candidate.
        """
        named = [(row.name, BASE_BUDGET, seed) for row in self.table.rows for seed in self.table.seeds]
        headline, chosen = self.table.headline, self.headline_row()
        if headline is not None and chosen is not None:
            names = [*headline.references, *([chosen.value] if chosen.made else headline.candidates)]
            named += [(name, budget, seed) for name in names for budget, seed in self._beside(headline)]
        return {
            (name, seed, budget, route)
            for name, budget, seed in named
            for route in routes_of(self.table, self.table.row(name), self._config(name, seed, budget, None)[0])
        }

    def cells(self, only: frozenset[str] = frozenset()) -> list[Cell]:
        """All cells in the order in which they are run: the grid first. `only`: rows, and the grid they need."""
        rows = [row for row in self.table.rows if not only or row.name in only]
        found: list[Cell] = []
        tune = self.table.tune
        for choice, name in tune.choices.items() if tune else ():
            if any(row.tuned_as == choice for row in rows) and tune is not None:
                rates = [Choice(rate, True) for rate in tune.learning_rates]
                found += [self.cell(self.table.row(name), tune.seed, BASE_BUDGET, r, (VALIDATION,)) for r in rates]
        found += [cell for row, cell in self.reported() if row in rows]
        return merged(found)


def merged(cells: Iterable[Cell]) -> list[Cell]:
    """One cell a digest, in the order of the first; what a provisional one asks for waits until it is none."""
    found: dict[str, Cell] = {}
    for cell in cells:
        known = found.get(cell.digest)
        if known is None or (known.provisional and not cell.provisional):
            found[cell.digest] = cell
        elif known.provisional or not cell.provisional:
            found[cell.digest] = replace(
                known,
                rows=_union(known.rows, cell.rows),
                routes=tuple(sorted(_union(known.routes, cell.routes))),
                splits=_union(known.splits, cell.splits),
                core_s=max(known.core_s, cell.core_s),
                cloze=known.cloze or cell.cloze,
                cloze_s=max(known.cloze_s, cell.cloze_s),
            )
    return list(found.values())


def _lowest(values: Mapping[T, float | None]) -> T | None:
    """The key of the lowest value, the first of equal ones; None while any value is missing."""
    known = {key: value for key, value in values.items() if value is not None}
    return min(known, key=known.__getitem__) if known.keys() == values.keys() and known else None


def _union(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
