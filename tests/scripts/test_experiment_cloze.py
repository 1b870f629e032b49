"""The cloze of a table: asked once of every reported cell, never of the grid, and of what was finished before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.load import InvalidConfig
from scripts import experiment_paths
from scripts.experiment_cloze import Cloze, FoundCloze
from scripts.experiment_cloze_page import cloze_domain_lines, cloze_lines, cloze_words
from scripts.experiment_cost import cloze_seconds
from scripts.experiment_page import Circumstances, Section, page
from scripts.experiment_plan import Cell, TablePlan
from scripts.experiment_results import is_finished, only, paired_difference, result_rows
from scripts.experiment_table import Table, configured, load_table
from scripts.experiment_work import Work
from tests.scripts.bench import Bench
from tests.scripts.tables import Document, measured, unmeasured

ASKED = {"items": 30, "context_tokens": 32, "ending_tokens": 8}
CLOZE = Cloze(**ASKED)


@pytest.fixture
def asking(document: Document, write_table: Callable[..., Path]) -> Table:
    """The tiny table with a cloze, dense and k-means without a grid, one seed."""
    document["cloze"] = ASKED
    del document["tune"], document["headline"], document["budgets"]
    document["seeds"], document["rows"] = [0], document["rows"][:2]
    for row in document["rows"]:
        del row["tuned_as"]
    return load_table(write_table(document))


def cells_of(table: Table) -> list[Cell]:
    return TablePlan(table, "", unmeasured).cells()


def without_cloze(cells: list[Cell]) -> list[Cell]:
    """As they were before the table asked for one."""
    return [replace(cell, cloze=None) for cell in cells]


def test_a_cloze_is_the_last_step_of_a_reported_cell(bench: Bench, asking: Table) -> None:
    cells = cells_of(asking)
    assert bench.carry_out(lambda: cells).finished == 2
    kmeans = [call for call in bench.calls() if str(bench.work.run_dir(cells[1])) in call]
    assert [call[0] for call in kmeans] == ["run", "evaluate", "evaluate", "cloze"]
    form = ["--split", "test", "--items", "30", "--context", "32", "--ending", "8"]
    routes = ["--route", "every:16", "--route", "every:32", "--route", "oracle:sequence", "--route", "sequence"]
    assert kmeans[-1] == ["cloze", str(bench.work.run_dir(cells[1])), *form, *routes, "--json"]
    before = bench.calls()
    bench.work = Work(bench.work.root)
    assert bench.carry_out(lambda: cells).finished == 0
    assert bench.calls() == before


def test_a_cell_that_was_finished_before_is_asked_on_the_run_that_is_there(bench: Bench, asking: Table) -> None:
    cells = cells_of(asking)
    bench.carry_out(lambda: without_cloze(cells))
    bench.work = Work(bench.work.root)
    assert [bench.work.left(cell) for cell in cells] == [["cloze"], ["cloze"]]
    assert [bench.work.core_s_left(cell) for cell in cells] == [cell.cloze_s for cell in cells]
    assert all(is_finished(cell, bench.work.measurement) for cell in cells), "its perplexities are shown without it"
    before = len(bench.calls())
    assert bench.carry_out(lambda: cells).finished == 2
    assert [call[0] for call in bench.calls()[before:]] == ["cloze", "cloze"]


def test_the_cells_are_the_same_with_a_cloze_and_without(document: Document, write_table: Callable[..., Path]) -> None:
    table = load_table(write_table(document))
    document["cloze"] = ASKED
    asking = load_table(write_table(document))
    assert [cell.digest for cell in cells_of(asking)] == [cell.digest for cell in cells_of(table)]
    for cell in cells_of(asking):
        assert (cell.cloze is not None) == ("test" in cell.splits)
    assert not any(cell.cloze for cell in cells_of(table))


@pytest.mark.parametrize(
    ("changes", "asks_again"),
    [
        ({"cloze": CLOZE.model_copy(update={"items": 31})}, True),
        ({"cloze": CLOZE.model_copy(update={"ending_tokens": 9})}, True),
        ({"routes": ("sequence", "ensemble:2")}, True),
        ({"routes": ("sequence",)}, False),
    ],
)
def test_another_question_is_asked_again(
    changes: dict[str, Any], asks_again: bool, bench: Bench, asking: Table
) -> None:
    cell = cells_of(asking)[1]
    bench.carry_out(lambda: [cell])
    other = replace(cell, **changes)
    assert ("cloze" in bench.work.left(other)) == asks_again


def test_oracles_that_see_the_ending_are_not_asked() -> None:
    routes = ["oracle:every:32", "oracle:sequence", "path:0.0", "router:16"]
    words = CLOZE.words("test", routes)
    assert [word for word in words if ":" in word] == routes[1:]
    found = FoundCloze(FoundCloze.kept({}, CLOZE.asked("test", routes)))
    assert found.answers(CLOZE, "test", routes)
    assert not found.answers(CLOZE, "validation", routes)


def test_a_cloze_that_fails_or_is_damaged_costs_nothing_else(bench: Bench, asking: Table) -> None:
    cells = cells_of(asking)[:1]
    (bench.data / "fail").write_text("--ending", encoding="utf-8")
    outcome = bench.carry_out(lambda: cells)
    assert list(outcome.failed.values()) == ["cloze ended with code 1: something is wrong here"]
    (bench.data / "fail").unlink()
    bench.carry_out(lambda: cells)
    (bench.work.folder(cells[0].digest) / "cloze.json").write_text("{", encoding="utf-8")
    bench.work = Work(bench.work.root)
    before = len(bench.calls())
    bench.carry_out(lambda: cells)
    assert [call[0] for call in bench.calls()[before:]] == ["cloze"]


def test_a_run_that_came_to_no_number_is_not_asked(bench: Bench, asking: Table) -> None:
    cell = cells_of(asking)[0]
    bench.work.prepare(cell)
    bench.work.came_to_no_number(cell, "it diverged", dict(measured({}).run["hardware"]))
    assert bench.work.left(cell) == []


def test_the_estimate_by_hand(asking: Table) -> None:
    """Base, and two paths of four: 3 x 4 endings of 41 + 9 tokens, 4 contexts of 32; steps of 4 x 64 tokens."""
    run = configured(asking, asking.row("kmeans"), 0, "base", None).experiment
    expected = 0.1 * 30 * (3 * 4 * 50 + 4 * 32) / 256 / 3
    assert cloze_seconds(asking.cost, asking.experiment, run, CLOZE) == pytest.approx(expected)
    assert cloze_seconds(asking.cost, asking.experiment, run, None) == 0
    cell = cells_of(asking)[1]
    assert cell.cloze_s == pytest.approx(expected)
    assert cell.core_s == pytest.approx(without_cloze([cell])[0].core_s)


def test_a_form_that_does_not_fit_is_refused(document: Document, write_table: Callable[..., Path]) -> None:
    document["cloze"] = {**ASKED, "context_tokens": 16}
    with pytest.raises(InvalidConfig, match=r"tiny.yaml: cloze: a context of 16 tokens ends with the 16"):
        load_table(write_table(document))


def test_two_tables_ask_for_one_cloze(
    document: Document, write_table: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "documents.jsonl").write_text("{}", encoding="utf-8")
    paths = [write_table(document, "none")]
    for name, items in (("few", 30), ("many", 40)):
        document["cloze"] = {**ASKED, "items": items}
        paths.append(write_table(document, name))
    places = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--list"]
    assert experiment_paths.main([str(path) for path in paths[:2]] + places) == 0
    assert experiment_paths.main([str(path) for path in paths] + places) == 1
    assert "tables few and many ask for another cloze each" in capfd.readouterr().err


def test_the_list_shows_what_is_left_of_a_finished_cell(
    asking: Table, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "documents.jsonl").write_text("{}", encoding="utf-8")
    work = Work(tmp_path / "work")
    words = [str(tmp_path / "tiny.yaml"), "--data", str(tmp_path), "--work", str(work.root), "--list"]
    cell = experiment_paths.Experiment([tmp_path / "tiny.yaml"], tmp_path, work, []).cells()[0]
    work.prepare(cell)
    work.finished_run(cell, dict(measured({}).run))
    for split in cell.splits:
        work.finished_split(cell, split, dict(measured(dict.fromkeys(cell.routes, 9.0)).found["validation"]))
    assert experiment_paths.main(words) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "without cloze       tiny/dense" in lines[0]
    assert experiment_paths.main([*words, "--json"]) == 0
    first, second = json.loads(capfd.readouterr().out)
    assert first["core_s_left"] == round(cell.cloze_s) < first["core_s"]
    assert second["core_s_left"] == second["core_s"]


# --- results ----------------------------------------------------------------------------------------------------------


def found_cloze(cell: Cell, accuracy: float, digest: str = "e") -> FoundCloze:
    """Every later route finds a tenth more; by gain a tenth more than that."""
    routes = {route: accuracy + index / 10 for index, route in enumerate(sorted(cell.routes))}
    part = {
        "accuracy": {"base": 0.3, "dipaco": routes, "dense": 0.35},
        "standard_error": {"base": 0.01, "dipaco": dict.fromkeys(routes, 0.02), "dense": None},
        "gain_accuracy": {"base": 0.4, "dipaco": {route: value + 0.1 for route, value in routes.items()}, "dense": 0.4},
        "gain_standard_error": {"base": 0.01, "dipaco": dict.fromkeys(routes, 0.03), "dense": 0.01},
    }
    assert cell.cloze is not None
    found = {**part, "items_digest": digest, "per_domain": {"law": {"items": 9, **part}}}
    return FoundCloze(FoundCloze.kept(found, cell.cloze.asked("test", cell.routes)))


class Answered:
    """The tiny table with a cloze and all of its cells; rows -> accuracy of the first of their routes, by name."""

    def __init__(self, table: Table, **accuracy: float) -> None:
        self.known: dict[str, Any] = {}
        self.plan = TablePlan(table, "", self.known.get)
        for _ in range(2):
            for cell in self.plan.cells():
                values = dict.fromkeys(cell.routes, 50.0 if "tiny/dense" in cell.rows else 40.0)
                name = cell.rows[0].partition("/")[2]
                cloze = None
                if name in accuracy and cell.cloze is not None:
                    cloze = found_cloze(cell, accuracy[name] + cell.seed / 100)
                self.known[cell.digest] = replace(measured(values, values), cloze=cloze)

    def rows(self) -> list[dict[str, Any]]:
        return result_rows(self.plan, self.known.get)


@pytest.fixture
def chosen(document: Document, write_table: Callable[..., Path]) -> Table:
    document["cloze"] = ASKED
    return load_table(write_table(document))


def test_a_result_has_the_numbers_of_its_route(chosen: Table) -> None:
    rows = Answered(chosen, kmeans=0.2, dense=0.3).rows()
    sequence, every = (
        only(rows, row="kmeans", seed=1, budget="base", route=route)[0] for route in ("sequence", "every:32")
    )
    assert (sequence["cloze_accuracy"], sequence["cloze_gain_accuracy"]) == pytest.approx((0.51, 0.61))
    assert (every["cloze_accuracy"], every["cloze_standard_error"]) == pytest.approx((0.31, 0.02))
    assert (sequence["cloze_by_domain"], every["cloze_by_domain"]) == ({"law": pytest.approx([0.51, 0.61])}, None)
    assert sequence["cloze_items"] == "e"
    unasked = only(rows, row="product")[0]
    assert {unasked[key] for key in unasked if key.startswith("cloze")} == {None}


def test_of_other_models_and_of_a_path_at_random(asking: Table) -> None:
    cell = replace(cells_of(asking)[1], routes=("path:0.0", "path:0.1", "sequence"))
    found = found_cloze(cell, 0.2)
    numbers = found.numbers("dipaco", ["path:0.0", "path:0.1"])
    assert numbers is not None
    assert numbers["accuracy"] == pytest.approx(0.25)
    dense = found.numbers("dense", ["sequence"])
    assert dense == {"accuracy": 0.35, "standard_error": None, "gain_accuracy": 0.4, "gain_standard_error": 0.01}
    assert found.numbers("dipaco", ["path:0.0", "path:1.0"]) is None
    assert found.numbers("dipaco-best", ["sequence"]) is None


def test_another_form_is_no_answer(chosen: Table) -> None:
    answered = Answered(chosen, dense=0.3)
    other = chosen.model_copy(update={"cloze": CLOZE.model_copy(update={"items": 99})})
    rows = result_rows(TablePlan(other, "", answered.known.get), answered.known.get)
    assert {row["cloze_accuracy"] for row in rows} == {None}


def test_the_page_compares_every_row_with_dense_seed_by_seed(chosen: Table) -> None:
    answered = Answered(chosen, kmeans=0.2, dense=0.3)
    plan, rows = answered.plan, answered.rows()
    head, *lines = cloze_lines(plan, rows)
    assert {len(head)} == {len(line) for line in lines}
    assert [line[:2] for line in lines] == [
        ["dense (`dense`)", "none"],
        ["k-means (`kmeans`)", "sequence"],
        ["k-means (`kmeans`)", "every:16"],
        ["k-means (`kmeans`)", "every:32"],
        ["k-means (`kmeans`)", "oracle:sequence"],
    ]
    assert lines[1][2:6] == ["0.800 ± 0.000", "51.0 ± 1.0 %", "2.0", "+20.0 ± 0.0"]
    assert lines[2][5] == "-10.0 ± 0.0"
    assert list(cloze_domain_lines(plan, rows)) == [
        ["domain", "`dense`", "`kmeans`"],
        ["law", "31 / 41", "51 / 61"],
    ]
    machine = {"processor": "x", "cores": 2, "memory_gb": 4.0, "system": "Linux x86_64", "python": "3.12.1"}
    text = page([Section(plan, rows, [])], Circumstances("2026-01-02", "a command", [machine]))
    assert "| k-means (`kmeans`) | sequence | 0.800 ± 0.000 | 51.0 ± 1.0 % | 2.0 | +20.0 ± 0.0 | 61.0 ± 1.0 % |" in text
    assert "| law | 31 / 41 | 51 / 61 |" in text
    words = " ".join(cloze_words(plan, rows))
    assert words in text
    assert "at most 30 items of 32 tokens of context and 8 of ending" in words
    assert "Not measured yet: `product`." in words
    assert "same items" not in words


def test_a_page_without_answers_or_without_a_question(chosen: Table) -> None:
    answered = Answered(chosen)
    assert cloze_words(answered.plan, answered.rows())[0].endswith("Not measured yet.")
    assert cloze_lines(answered.plan, answered.rows()) == cloze_domain_lines(answered.plan, answered.rows()) == []
    unasked = chosen.model_copy(update={"cloze": None})
    assert cloze_words(TablePlan(unasked, "", unmeasured), []) == []


def test_rows_that_were_asked_other_items_are_told(chosen: Table) -> None:
    answered = Answered(chosen, kmeans=0.2, dense=0.3)
    rows = answered.rows()
    only(rows, row="dense")[0]["cloze_items"] = "f"
    assert cloze_words(answered.plan, rows)[0].endswith("Not all rows were asked the same items.")


def test_differences_are_paired_by_seed() -> None:
    mine = [{"seed": seed, "x": value} for seed, value in ((0, 5.0), (1, 9.0), (2, None), (3, 1.0))]
    others = [{"seed": seed, "x": value} for seed, value in ((1, 5.0), (0, 3.0), (2, 1.0))]
    spread = paired_difference(mine, others, "x")
    assert spread is not None
    assert (spread.mean, spread.count) == (3.0, 2)
    assert paired_difference(mine, [], "x") is None
