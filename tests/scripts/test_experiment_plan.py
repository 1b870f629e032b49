"""Which cells a table asks for, and that every choice rests on the validation split alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from scripts.experiment_cost import core_seconds
from scripts.experiment_measurement import Measurement
from scripts.experiment_plan import Cell, TablePlan, merged
from scripts.experiment_table import Table, configured, load_table
from tests.scripts.tables import DENSE, Document, measured

SLOW, FAST = 1.0e-3, 3.0e-3


class World:
    """Measurements that a plan sees as they come."""

    def __init__(self, table: Table, data: str = "") -> None:
        self.known: dict[str, Measurement] = {}
        self.plan = TablePlan(table, data, self.known.get)

    def cells(self, **wanted: Any) -> list[Cell]:
        return [cell for cell in self.plan.cells() if all(getattr(cell, k) == v for k, v in wanted.items())]

    def named(self, row: str) -> list[Cell]:
        return [cell for cell in self.plan.cells() if f"tiny/{row}" in cell.rows]

    def measure(self, row: str, rate: float, validation: float, test: float, **routes: float) -> None:
        """Measure all cells of a row at a learning rate; other routes are one worse where nothing is said."""
        for cell in self.named(row):
            if cell.learning_rate == rate:
                self.known[cell.digest] = measured(
                    {route: routes.get(_key(route), validation + 1) for route in cell.routes}
                    | {"sequence": validation},
                    dict.fromkeys(cell.routes, test),
                )


def _key(route: str) -> str:
    return route.replace(":", "_")


def test_the_grid_comes_first_and_never_asks_for_the_test_split(table: Table) -> None:
    world = World(table)
    first = world.plan.cells()[:4]
    assert [(cell.rows[0], cell.learning_rate) for cell in first] == [
        ("tiny/dense", SLOW),
        ("tiny/dense", FAST),
        ("tiny/kmeans", SLOW),
        ("tiny/kmeans", FAST),
    ]
    assert {cell.splits for cell in first} == {("validation",)}
    assert all(cell.provisional for cell in world.plan.cells()[4:])


def test_the_learning_rate_is_the_one_with_the_lowest_validation_perplexity(table: Table) -> None:
    world = World(table)
    world.measure("dense", SLOW, validation=50, test=10)
    assert not world.plan.learning_rate(table.row("dense")).made
    world.measure("dense", FAST, validation=40, test=90)
    chosen = world.plan.learning_rate(table.row("dense"))
    assert (chosen.value, chosen.made, chosen.at_edge) == (FAST, True, True)
    assert [cell.learning_rate for cell in world.named("dense") if cell.splits == ("validation", "test")] == [FAST] * 4


def test_a_run_that_came_to_no_number_is_never_chosen(table: Table) -> None:
    world = World(table)
    world.measure("dense", SLOW, validation=50, test=10)
    fast = next(cell for cell in world.named("dense") if cell.learning_rate == FAST)
    found = {**measured({"sequence": 1.0}).found["validation"], "perplexity": {"dipaco": {"sequence": None}}}
    world.known[fast.digest] = Measurement(measured({}).run, {"validation": found})
    assert world.plan.learning_rate(table.row("dense")).value == SLOW


def chosen_rates(world: World) -> None:
    for row in ("dense", "kmeans"):
        world.measure(row, SLOW, validation=90, test=10)
        world.measure(row, FAST, validation=80, test=95)


def test_variant_and_route_are_chosen_on_validation_when_all_candidates_are_there(table: Table) -> None:
    world = World(table)
    chosen_rates(world)
    world.measure("kmeans", FAST, validation=80, test=20, every_16=79, every_32=78)
    row, route = world.plan.headline_row(), world.plan.headline_route()
    assert row is not None
    assert route is not None
    assert not row.made
    assert not route.made
    world.measure("product", FAST, validation=70, test=99, every_16=60, every_32=61)
    row, route = world.plan.headline_row(), world.plan.headline_route()
    assert row is not None
    assert route is not None
    assert (row.value, row.made, route.value, route.made) == ("product", True, "every:16", True)


def test_the_chosen_row_and_the_references_get_more_seeds_and_budgets(table: Table) -> None:
    world = World(table)
    chosen_rates(world)
    more = world.cells(seed=2)
    assert [(cell.rows[0], cell.provisional) for cell in more] == [("tiny/dense", False), ("tiny/kmeans", True)]
    world.measure("kmeans", FAST, validation=80, test=20)
    world.measure("product", FAST, validation=70, test=99)
    extra = [(cell.rows[0], cell.seed, cell.budget) for cell in world.plan.cells() if cell.seed == 2]
    assert extra == [("tiny/dense", 2, "base"), ("tiny/product", 2, "base")]
    assert [cell.rows[0] for cell in world.cells(budget="double")] == ["tiny/dense", "tiny/product"]
    assert not any(cell.provisional for cell in world.plan.cells())


def test_what_is_equal_is_one_cell(document: Document, write_table: Callable[..., Path]) -> None:
    """Rows of one table, and tables with different grids: the dense model is trained once."""
    document["rows"].append(
        {"name": "again", "label": "again", "compute": "1x", "overrides": DENSE, "tuned_as": "dense"}
    )
    first = World(load_table(write_table(document)))
    document["experiment"]["topology"]["levels"][0]["modules"] = 4
    second = World(load_table(write_table(document, "wide")))
    first.measure("dense", SLOW, validation=1, test=1)
    first.measure("dense", FAST, validation=2, test=2)
    second.known.update(first.known)
    cells = merged([*first.plan.cells(), *second.plan.cells()])
    assert len({cell.digest for cell in cells}) == len(cells)
    dense = [cell for cell in cells if "tiny/dense" in cell.rows and (cell.seed, cell.learning_rate) == (1, SLOW)]
    assert [cell.rows for cell in dense] == [("tiny/dense", "tiny/again", "wide/dense", "wide/again")]
    assert not any({"tiny/kmeans", "wide/kmeans"} <= set(cell.rows) for cell in cells)


def test_a_baseline_of_a_run_is_a_row_of_the_same_cell(document: Document, write_table: Callable[..., Path]) -> None:
    document["experiment"]["baselines"] = [{"name": "dense"}]
    document["rows"][0] = {"name": "dense", "label": "dense", "compute": "1x", "tuned_as": "dipaco", "model": "dense"}
    del document["tune"]["choices"]["dense"]
    world = World(load_table(write_table(document)))
    world.measure("kmeans", SLOW, validation=1, test=1)
    world.measure("kmeans", FAST, validation=2, test=2)
    reported = [cell for cell in world.named("dense") if len(cell.splits) == 2 and cell.budget == "base"]
    assert [set(cell.rows) for cell in reported if cell.seed < 2] == [{"tiny/kmeans", "tiny/dense"}] * 2


def test_a_route_that_the_chosen_row_has_not_is_not_chosen(
    document: Document, write_table: Callable[..., Path]
) -> None:
    document["rows"][2]["routes"] = ["sequence", "every:32"]
    world = World(load_table(write_table(document)))
    chosen_rates(world)
    world.measure("kmeans", FAST, validation=80, test=20, every_16=10)
    world.measure("product", FAST, validation=70, test=99)
    route = world.plan.headline_route()
    assert route is not None
    assert (route.value, route.made) == ("every:32", True)


def test_early_stopping_is_a_row_of_the_same_cell(document: Document, write_table: Callable[..., Path]) -> None:
    document["experiment"]["early_stopping"] = {}
    document["rows"].append({**document["rows"][1], "name": "best", "model": "dipaco-best"})
    document["headline"]["candidates"].append("best")
    world = World(load_table(write_table(document)))
    assert [cell.rows for cell in world.named("best")][-1] == ("tiny/kmeans", "tiny/best")
    known = measured({"sequence": 5.0})
    found = {**known.found["validation"], "perplexity": {"dipaco": {"sequence": 5.0}, "dipaco-best": {"sequence": 4.0}}}
    both = Measurement(known.run, {"validation": found})
    assert [both.perplexity("validation", model, "sequence") for model in ("dipaco", "dipaco-best")] == [5.0, 4.0]


def test_a_grid_cell_that_is_reported_gets_the_test_split(table: Table) -> None:
    world = World(table)
    chosen_rates(world)
    cells = {cell.learning_rate: cell for cell in world.named("dense") if (cell.seed, cell.budget) == (0, "base")}
    assert cells[FAST].splits == ("validation", "test")
    assert cells[SLOW].splits == ("validation",)


def test_the_digest_follows_what_is_read_and_not_the_name(table: Table, document: Document, write_table: Any) -> None:
    digests = [World(table, data).plan.cells()[0].digest for data in ("", "a", "b")]
    assert len(set(digests)) == 3
    document["title"] = "another"
    renamed = load_table(write_table(document, "renamed"))
    assert World(renamed).plan.cells()[0].digest == digests[0]


def test_one_row_alone_takes_its_grid_with_it(table: Table) -> None:
    cells = World(table).plan.cells(only=frozenset({"product"}))
    assert {row for cell in cells for row in cell.rows} == {"tiny/kmeans", "tiny/product"}
    assert [cell.rows[0] for cell in cells][:2] == ["tiny/kmeans", "tiny/kmeans"]


def test_the_estimate_counts_every_shard_and_scales_with_the_model(table: Table) -> None:
    """By hand: 10 + 4 shards x 2 phases x 5 steps of 0.1 s, and 4 paths x 400 sequences at a third of a step of 4."""
    cell = next(cell for cell in World(table).plan.cells() if cell.rows[0] == "tiny/kmeans")
    assert cell.core_s == pytest.approx(5 + 2 + 0.1 * (10 + 40 + 4 * 400 / 4 / 3))
    wide = table.experiment.model_copy(
        update={
            "inner": table.experiment.inner.model_copy(update={"batch_rows": 8}),
            "evaluation": table.experiment.evaluation.model_copy(update={"max_sequences": None}),
        }
    )
    assert core_seconds(table.cost, table.experiment, wide, ("validation", "test")) == pytest.approx(5 + 2 + 0.2 * 50)


def test_a_limit_counts_for_each_token_file_of_its_split(document: Document, write_table: Callable[..., Path]) -> None:
    """By hand: a tenth of 18 million characters is 3 files of 800,000; the other splits have one."""
    experiment = document["experiment"]
    experiment["corpus"]["splits"] = {"router": 0.1, "stop": 0.04, "validation": 0.04, "test": 0.04}
    experiment["corpus"]["range_characters"] = 800_000
    stages = [*experiment["stages"], {"kind": "reshard", "max_sequences": 30}, experiment["stages"][-1]]
    document["rows"].append(
        {"name": "gater", "label": "gater", "compute": "4x", "tuned_as": "dipaco", "overrides": {"stages": stages}}
    )
    document["rows"].append(
        {**document["rows"][-1], "name": "few", "overrides": {"stages": deepcopy(stages), "sharding.kind": "kmeans"}}
    )
    document["rows"][-1]["overrides"]["stages"][-2]["candidates"] = 2
    costs = {}
    for characters in (0, 18_000_000):
        document["cost"]["characters"] = characters
        table = load_table(write_table(document))
        for name in ("kmeans", "gater", "few"):
            run = configured(table, table.row(name), 0, "base", None).experiment
            costs[name, characters] = core_seconds(table.cost, table.experiment, run, ("validation",))
    looked_at = 0.1 / 4 / 3 * 30
    assert costs["kmeans", 18_000_000] == pytest.approx(costs["kmeans", 0])
    assert costs["gater", 18_000_000] - costs["gater", 0] == pytest.approx((3 - 1) * 4 * looked_at)
    assert costs["few", 18_000_000] - costs["few", 0] == pytest.approx((3 - 1) * 2 * looked_at)
