"""Results are written from whatever is finished, and never from anything else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import experiment_paths
from scripts.experiment_measurement import Measurement
from scripts.experiment_page import Circumstances, Section, page
from scripts.experiment_plan import TablePlan
from scripts.experiment_results import (
    ResultRow,
    Spread,
    WouldBeLost,
    check_nothing_is_lost,
    check_tables_are_given,
    missing,
    only,
    paired_ratio,
    result_rows,
    spread_of,
)
from scripts.experiment_table import Table, load_table
from scripts.experiment_work import Work
from tests.scripts.tables import Document, measured

KEYS = {
    "row",
    "levels",
    "seed",
    "route",
    "test_perplexity",
    "validation_perplexity",
    "bits_per_byte",
    "ratio_to_dense",
    "tokens",
    "config_digest",
    "headline",
}


class Filled:
    """A table with made up measurements: row -> perplexity on validation; the test split is twice as hard."""

    def __init__(self, table: Table) -> None:
        self.known: dict[str, Measurement] = {}
        self.plan = TablePlan(table, "", self.known.get)

    def fill(self, row: str, value: float, seeds: tuple[int, ...] = (0, 1, 2), budget: str = "base") -> None:
        for cell in self.plan.cells():
            if f"tiny/{row}" in cell.rows and cell.seed in seeds and cell.budget == budget:
                validation = dict.fromkeys(cell.routes, value + cell.seed)
                validation |= {"every:16": value - 2} if "every:16" in cell.routes else {}
                self.known[cell.digest] = measured(validation, {route: 2 * v for route, v in validation.items()})

    def rows(self) -> list[dict[str, Any]]:
        return result_rows(self.plan, self.known.get)


@pytest.fixture
def filled(table: Table) -> Filled:
    filled = Filled(table)
    for row, value in (("dense", 50.0), ("kmeans", 40.0), ("product", 45.0)):
        filled.fill(row, value)
        filled.fill(row, value)  # what the choices have opened
    return filled


def test_a_row_says_what_was_measured(filled: Filled) -> None:
    row = only(filled.rows(), row="kmeans", seed=1, budget="base", route="sequence")
    assert len(row) == 1
    assert row[0].keys() >= KEYS
    wanted = {"levels": "2x2", "validation_perplexity": 41, "test_perplexity": 82, "tokens": 1000}
    wanted |= {"bytes_saved": 4.0, "smallest_shard": pytest.approx(0.8), "least_used_path": pytest.approx(0.4)}
    wanted |= {
        "bits_per_byte": pytest.approx(8.2),
        "ratio_to_dense": pytest.approx(82 / 102),
        "config_digest": "c" * 64,
    }
    assert row[0] == row[0] | wanted


def test_a_run_that_took_results_over_claims_neither_time_nor_bytes(filled: Filled) -> None:
    for digest, found in filled.known.items():
        filled.known[digest] = replace(found, run={**found.run, "reused_tasks": 3})
    assert {(row["wall_s"], row["bytes_saved"]) for row in filled.rows()} == {(None, None)}
    assert {row["tokens"] for row in filled.rows()} == {1000}


def test_ratios_are_to_dense_of_the_same_seed_and_budget(filled: Filled) -> None:
    filled.fill("kmeans", 30.0, budget="double")
    double = only(filled.rows(), row="kmeans", budget="double", route="sequence")
    assert [row["ratio_to_dense"] for row in double] == [None]
    filled.fill("dense", 60.0, budget="double")
    double = only(filled.rows(), row="kmeans", budget="double", route="sequence")
    assert [row["ratio_to_dense"] for row in double] == [0.5]


def test_the_headline_is_what_validation_chose(filled: Filled) -> None:
    marked = {(row["row"], row["route"]) for row in filled.rows() if row["headline"]}
    assert marked == {("kmeans", "sequence"), ("kmeans", "every:16")}


def test_nothing_is_a_headline_while_a_candidate_is_missing(table: Table) -> None:
    partial = Filled(table)
    for row in ("dense", "kmeans"):
        partial.fill(row, 40.0)
    partial.fill("product", 45.0, seeds=(0,))
    rows = partial.rows()
    assert {row["row"] for row in rows} == {"dense", "kmeans", "product"}
    assert not any(row["headline"] for row in rows)


def test_a_cell_without_its_test_split_is_missing(filled: Filled) -> None:
    cell = next(cell for row, cell in filled.plan.reported() if row.name == "product" and cell.seed == 1)
    known = filled.known[cell.digest]
    filled.known[cell.digest] = Measurement(known.run, {"validation": known.found["validation"]})
    assert not only(filled.rows(), row="product", seed=1)
    assert [each.digest for each in missing(filled.plan, filled.known.get) if each.budget == "base"] == [cell.digest]


def test_a_path_at_random_has_the_mean_of_the_losses_of_all() -> None:
    known = measured({"path:0": 2.0, "path:1": 8.0, "oracle:sequence": 1.0})
    assert known.perplexity("validation", "dipaco", "random") == pytest.approx(4.0)
    assert known.bits_per_byte("validation", "dipaco", "random") == pytest.approx(0.5)


def test_means_and_spreads_by_hand() -> None:
    assert Spread.of([1.0, 2.0, 6.0]).text(".2f") == "3.00 ± 2.65"
    assert Spread.of([0.7]).text(".3f") == "0.700"
    rows: list[ResultRow] = [{"x": 1.0}, {"x": None}, {"x": 3.0}]
    spread = spread_of(rows, "x")
    assert spread is not None
    assert (spread.mean, spread.count) == (2.0, 2)
    assert spread.deviation == pytest.approx(2**0.5)
    assert spread_of(rows[1:2], "x") is None


def test_ratios_to_another_row_are_paired_by_seed() -> None:
    mine: list[ResultRow] = [{"seed": seed, "test_perplexity": value} for seed, value in enumerate((10.0, 40.0, 1.0))]
    others: list[ResultRow] = [{"seed": 1, "test_perplexity": 80.0}, {"seed": 0, "test_perplexity": 40.0}]
    ratio = paired_ratio(mine, others)
    assert ratio is not None
    assert (ratio.mean, ratio.count) == (0.375, 2)
    assert ratio.deviation == pytest.approx(0.125 * 2**0.5)
    assert paired_ratio(mine, []) is None


def written(filled: Filled) -> str:
    section = Section(filled.plan, filled.rows(), missing(filled.plan, filled.known.get))
    machine = {"processor": "x", "cores": 2, "memory_gb": 4.0, "system": "Linux x86_64", "python": "3.12.1"}
    return page([section], Circumstances("2026-01-02", "python scripts/experiment_paths.py", [machine]))


def test_the_page_has_the_numbers_and_what_is_missing(filled: Filled) -> None:
    text = written(filled)
    main = [line for line in text.splitlines() if line.startswith(("| row |", "| k-means (", "| dense ("))]
    assert len({line.count("|") for line in main}) == 1
    assert "| k-means (`kmeans`) | 4x | sequence | 40 | 1,000 | 82.00 ± 2.00 | 0.804 ± 0.004 |" in text
    assert "Headline, chosen on validation: `kmeans`, routed by `every:16`." in text
    assert "| base | every:16 | 76.00 ± 0.00 |" in text
    assert "chosen on validation with seed 0 among 0.001, 0.003: dense 0.001 (at the edge of the grid)" in text
    assert "Smallest shard of all runs: 0.80 of its fair share" in text
    assert "Not finished, 2 cells: `dense 0 double`, `kmeans 0 double`." in text
    assert "x (2 cores, 4 GB, Linux x86_64, Python 3.12.1)" in text


def test_the_page_of_a_part_says_so(table: Table) -> None:
    partial = Filled(table)
    partial.fill("dense", 50.0, seeds=(0,))
    text = written(partial)
    main = [line for line in text.splitlines() if line.startswith(("| row |", "| k-means (", "| dense ("))]
    assert len({line.count("|") for line in main}) == 1
    assert "| k-means (`kmeans`) | 4x | - | - |" in text
    assert "Headline: not chosen yet" in text
    assert "dipaco not chosen yet" in text
    assert "`kmeans 1`" in text


# --- the command ------------------------------------------------------------------------------------------------------


def call(table: Path, tmp_path: Path, *words: str) -> int:
    places = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    return experiment_paths.main([str(table), *places, *words])


@pytest.fixture
def table_file(document: Document, write_table: Callable[..., Path], tmp_path: Path) -> Path:
    (tmp_path / "documents.jsonl").write_text("{}", encoding="utf-8")
    return write_table(document)


def finish(table_file: Path, tmp_path: Path, row: str) -> None:
    """Put what the steps of a row's cells would leave into the work folder: of the grid, then of what it opened."""
    work = Work(tmp_path / "work")
    cells = experiment_paths.Experiment([table_file], tmp_path, work, []).cells
    for cell in itertools.chain.from_iterable(cells() for _ in range(2)):
        if f"tiny/{row}" in cell.rows and not cell.provisional:
            work.prepare(cell)
            work.finished_run(cell, dict(measured({}).run))
            for split in cell.splits:
                values = dict.fromkeys(cell.routes, 10.0 + cell.seed)
                work.finished_split(cell, split, dict(measured(values).found["validation"]))


def test_with_nothing_finished_nothing_is_written(
    table_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(table_file, tmp_path, "--budget-s", "0") == 3
    assert "no cell is finished: nothing is written into" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_finished_cells_are_written(
    table_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    finish(table_file, tmp_path, "dense")
    assert call(table_file, tmp_path, "--budget-s", "0", "--json") == 3
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {(row["row"], row["seed"], row["budget"]) for row in rows} == {
        ("dense", 0, "base"),
        ("dense", 1, "base"),
        ("dense", 2, "base"),
        ("dense", 0, "double"),
    }
    assert json.loads(capfd.readouterr().out) == rows
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "`kmeans 0`" in text
    assert str(tmp_path) not in text
    assert "--data DATA" in text


def test_the_list_shows_cells_states_and_their_sum(
    table_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    finish(table_file, tmp_path, "dense")
    assert call(table_file, tmp_path, "--list") == 0
    lines = capfd.readouterr().out.splitlines()
    assert "finished            tiny/dense (seed 0, base budget, lr 0.003)" in lines[1]
    assert "open                tiny/kmeans (seed 0, base budget, lr 0.001)" in lines[2]
    assert sum("waits for a choice" in line for line in lines) > 0
    assert call(table_file, tmp_path, "--list", "--json") == 0
    cells = json.loads(capfd.readouterr().out)
    assert lines[-1].startswith(f"{len(cells)} cells, {sum(cell['core_s'] for cell in cells):,} core-s by estimate")


def test_what_was_not_asked_for_is_not_lost(
    document: Document, write_table: Any, table_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    finish(table_file, tmp_path, "dense")
    call(table_file, tmp_path, "--budget-s", "0")
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert call(write_table(document, "other"), tmp_path, "--budget-s", "0") == 1
    assert "also holds results of table tiny; name that table, too" in capfd.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    with pytest.raises(WouldBeLost):
        check_tables_are_given(tmp_path / "out" / "results.json", ["other"])


def test_fewer_results_do_not_replace_a_page(
    table_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    finish(table_file, tmp_path, "dense")
    call(table_file, tmp_path, "--budget-s", "0")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    finish(table_file, tmp_path, "kmeans")
    assert call(table_file, tmp_path, "--budget-s", "0") == 1
    said = capfd.readouterr().err
    assert "4 results that are asked for and not finished in this --work: tiny/dense seed 0 base, " in said
    assert "give the --work in which they are" in said
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    finish(table_file, tmp_path, "dense")
    assert call(table_file, tmp_path, "--budget-s", "0") == 3
    assert len(json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))) > 4


@pytest.mark.parametrize(
    ("gone", "may_go"),
    [
        ({"row": "dense"}, False),
        ({"seed": 1}, False),
        ({"budget": "double"}, False),
        ({"route": "every:16"}, False),
        ({"row": "an-earlier-row"}, True),
        ({"row": "dense", "seed": 9}, True),
        ({"row": "product", "seed": 2}, True),
        ({"route": "every:128"}, True),
    ],
)
def test_what_the_table_asks_for_no_more_may_go(
    gone: dict[str, Any], may_go: bool, filled: Filled, tmp_path: Path
) -> None:
    filled.fill("dense", 50.0, budget="double")
    filled.fill("kmeans", 50.0, budget="double")
    rows = filled.rows()
    earlier = {**rows[0], **gone}
    results = tmp_path / "results.json"
    results.write_text(json.dumps([*rows, earlier]), encoding="utf-8")
    left = [row for row in rows if not only([row], **gone)]
    if may_go:
        check_nothing_is_lost(results, [filled.plan], rows)
    else:
        with pytest.raises(WouldBeLost, match="results that are asked for and not finished"):
            check_nothing_is_lost(results, [filled.plan], left)


def test_while_the_headline_is_open_every_candidate_may_be_it(filled: Filled, table: Table, tmp_path: Path) -> None:
    """A page of another choice: with nothing measured its seeds and budgets count, too."""
    earlier = {**only(filled.rows(), row="kmeans", seed=2)[0], "row": "product"}
    results = tmp_path / "results.json"
    results.write_text(json.dumps([earlier]), encoding="utf-8")
    check_nothing_is_lost(results, [filled.plan], filled.rows())
    with pytest.raises(WouldBeLost, match="tiny/product seed 2 base"):
        check_nothing_is_lost(results, [Filled(table).plan], [])


@pytest.mark.parametrize("text", ["", "{", "3", "[3]"])
def test_a_file_without_rows_has_nothing_to_lose(text: str, filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    check_nothing_is_lost(tmp_path / "results.json", [filled.plan], [])


def test_the_command_of_a_part_says_which(table_file: Path, tmp_path: Path) -> None:
    finish(table_file, tmp_path, "dense")
    call(table_file, tmp_path, "--budget-s", "0", "--only", "dense", "--only", "kmeans")
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "--workers 2 --at-once 1 --only dense --only kmeans\n" in text


def test_the_page_says_whose_bytes_hold_early_stopping(document: Document, write_table: Callable[..., Path]) -> None:
    stopped: Document = {"early_stopping": {}}
    document["rows"] += [
        {**document["rows"][1], "name": "gater", "overrides": stopped},
        {**document["rows"][1], "name": "gater-best", "overrides": stopped, "model": "dipaco-best"},
    ]
    both = Filled(load_table(write_table(document)))
    for row in ("dense", "kmeans"):
        both.fill(row, 40.0)
    assert "what early stopping" not in written(both)
    both.fill("gater", 40.0)
    assert "Bytes saved of `gater` and `gater-best`: these runs keep the best version of every path" in written(both)


def test_a_row_that_is_none_is_told(table_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(table_file, tmp_path, "--only", "kmean") == 1
    assert "--only 'kmean' is no row of these tables; they have dense, kmeans, product" in capfd.readouterr().err


@pytest.mark.extra
def test_a_picture_stands_beside_the_page(table_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    finish(table_file, tmp_path, "dense")
    call(table_file, tmp_path, "--budget-s", "0")
    picture = (tmp_path / "out" / "results-tiny.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 100_000
    assert "![Tiny](results-tiny.png)" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
