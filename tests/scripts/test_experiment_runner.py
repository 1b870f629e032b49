"""Cells are carried out once: what is finished is kept, what was interrupted goes on, what failed is said."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import InvalidConfig, load_config
from coordinator.journal import RunUnusable
from scripts.experiment_measurement import describe
from scripts.experiment_patience import Patience
from scripts.experiment_plan import Cell, TablePlan
from scripts.experiment_table import Table, load_table
from scripts.experiment_work import Work, WorkInUse, data_digest
from tests.scripts.bench import Bench, until
from tests.scripts.tables import Document, unmeasured


def test_a_cell_is_a_run_and_its_evaluations(bench: Bench, two: list[Cell]) -> None:
    outcome = bench.carry_out(lambda: two)
    assert (outcome.finished, outcome.failed, outcome.stopped) == (2, {}, False)
    run, evaluate = bench.calls()[:2]
    folder = bench.work.folder(two[0].digest)
    words = ["run", str(folder / "config.yaml"), "--workers", "3", "--run-dir", str(folder / "run")]
    assert run == [*words, "--reuse", str(bench.work.reuse), "--json"]
    assert evaluate == ["evaluate", str(folder / "run"), "--split", "validation", "--route", "sequence", "--json"]
    assert load_config(folder / "config.yaml").experiment == two[0].config.experiment
    assert not (folder / "run" / "workers").exists()
    known = bench.work.measurement(two[0].digest)
    assert known is not None
    assert known.perplexity("validation", "dipaco", "none") == 21
    assert known.perplexity("test", "dipaco", "none") is None
    assert any(line.startswith("cell 1 of 2: tiny/dense seed 0 lr 0.001; about ") for line in bench.said)


def test_what_is_finished_is_not_done_again(bench: Bench, two: list[Cell]) -> None:
    bench.carry_out(lambda: two)
    before = bench.calls()
    bench.work = Work(bench.work.root)
    assert bench.carry_out(lambda: two).finished == 0
    assert bench.calls() == before


def test_a_cell_of_an_earlier_schema_is_known_by_its_configuration(bench: Bench, two: list[Cell]) -> None:
    """As it would be had the schema got `eps` since: another digest, and no such key in the file."""
    bench.carry_out(lambda: two)
    earlier = bench.work.folder(two[0].digest).rename(bench.work.root / "earlier")
    config = (earlier / "config.yaml").read_text(encoding="utf-8")
    (earlier / "config.yaml").write_text(config.replace("    eps: 1.0e-08\n", ""), encoding="utf-8")
    assert len((earlier / "config.yaml").read_text(encoding="utf-8")) < len(config)
    bench.work = Work(bench.work.root)
    assert bench.carry_out(lambda: two).finished == 0
    for name, old, new in (("config.yaml", "seed: 0", "seed: 1"), ("identity.json", '"numerics": ', '"numerics": 9')):
        before = (earlier / name).read_text(encoding="utf-8")
        (earlier / name).write_text(before.replace(old, new), encoding="utf-8")
        bench.work = Work(bench.work.root)
        assert bench.work.left(two[0]) == ["run", "validation"], name
        (earlier / name).write_text(before, encoding="utf-8")


def test_another_route_is_measured_on_the_run_that_is_there(
    bench: Bench, document: Document, write_table: Callable[..., Path]
) -> None:
    def kmeans() -> list[Cell]:
        plan = TablePlan(load_table(write_table(document)), "", unmeasured)
        return [cell for cell in plan.cells() if cell.rows == ("tiny/kmeans",)][:1]

    document["tune"]["seed"] = 9
    bench.carry_out(kmeans)
    document["routes"].append("likelihood:16")
    bench.carry_out(kmeans)
    assert [call[0] for call in bench.calls()] == ["run", "evaluate", "evaluate"]
    assert "likelihood:16" in bench.calls()[-1]


def test_one_that_fails_is_said_and_the_others_go_on(bench: Bench, two: list[Cell]) -> None:
    (bench.data / "fail").write_text(two[0].digest[:16], encoding="utf-8")
    outcome = bench.carry_out(lambda: two)
    assert outcome.failed == {two[0].digest: "run ended with code 1: something is wrong here"}
    assert outcome.finished == 1
    (bench.data / "fail").unlink()
    assert bench.carry_out(lambda: two).finished == 1


def test_a_failed_evaluation_does_not_cost_the_run(bench: Bench, two: list[Cell]) -> None:
    (bench.data / "fail").write_text("evaluate", encoding="utf-8")
    assert len(bench.carry_out(lambda: two[:1]).failed) == 1
    (bench.data / "fail").unlink()
    bench.carry_out(lambda: two[:1])
    assert [call[0] for call in bench.calls()] == ["run", "evaluate", "evaluate"]


def not_json(run_dir: Path) -> dict[str, Any]:
    raise json.JSONDecodeError("Expecting value", f"{run_dir}", 0)


def no_run(run_dir: Path) -> dict[str, Any]:
    raise RunUnusable("that run is damaged")


@pytest.mark.parametrize(
    ("reader", "sentence"),
    [(describe, "holds no state.db"), (not_json, "Expecting value"), (no_run, "that run is damaged")],
)
def test_a_run_that_cannot_be_read_is_a_failed_cell(
    reader: Callable[[Path], dict[str, Any]], sentence: str, bench: Bench, two: list[Cell]
) -> None:
    kept, bench.describe = bench.describe, reader
    outcome = bench.carry_out(lambda: two)
    assert outcome.failed.keys() == {cell.digest for cell in two}, "one did not keep the other from its turn"
    assert all(
        said.startswith("what the run left cannot be read: ") and sentence in said for said in outcome.failed.values()
    )
    bench.describe = kept
    assert bench.carry_out(lambda: two).finished == 2


def test_an_evaluation_that_writes_no_json_is_a_failed_cell(bench: Bench, two: list[Cell]) -> None:
    (bench.data / "garble").touch()
    outcome = bench.carry_out(lambda: two)
    assert len(outcome.failed) == 2
    assert outcome.failed[two[0].digest].startswith("what validation wrote cannot be read: Expecting property name")
    (bench.data / "garble").unlink()
    assert bench.carry_out(lambda: two).finished == 2


@pytest.mark.parametrize("name", ["run", "validation"])
def test_what_is_damaged_in_the_work_folder_is_made_again(name: str, bench: Bench, two: list[Cell]) -> None:
    bench.carry_out(lambda: two)
    (bench.work.folder(two[0].digest) / f"{name}.json").write_text("{", encoding="utf-8")
    bench.work = Work(bench.work.root)
    assert bench.work.left(two[0])[0] == name
    assert bench.carry_out(lambda: two).finished == 1


def test_a_stop_ends_the_run_in_order_and_the_next_call_continues_it(bench: Bench, two: list[Cell]) -> None:
    (bench.data / "hold").touch()
    started = bench.work.run_dir(two[0]) / "started"
    outcome = bench.carry_out(lambda: two, must_stop=started.exists)
    assert outcome.stopped
    assert bench.work.left(two[0]) == ["run", "validation"]
    assert bench.work.begun(two[0])
    (bench.data / "hold").unlink()
    assert bench.carry_out(lambda: two).finished == 2
    assert started.read_text(encoding="utf-8") == "xx", "the same run directory"


@pytest.mark.parametrize(("deaf", "kill_s"), [("SIGTERM", 1e6), ("nothing", 0.1)])
def test_a_run_that_hangs_is_ended_at_the_second_wish(
    deaf: str, kill_s: float, bench: Bench, two: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a signal that it does not get: SIGTERM ends the one, and only SIGKILL the other."""
    monkeypatch.setattr("scripts.experiment_runner.KILL_S", kill_s)
    (bench.data / "hold").write_text(deaf, encoding="utf-8")
    started = bench.work.run_dir(two[0]) / "started"
    assert bench.carry_out(lambda: two, must_stop=started.exists, must_end=lambda: True).stopped
    assert "stopping 1 cells in order; a second Ctrl-C ends them" in bench.said


def test_a_first_signal_stops_and_a_second_one_ends() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    patience = Patience()
    try:
        patience.listen()
        seen = [(patience.is_over(), patience.is_gone())]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            seen.append((patience.is_over(), patience.is_gone()))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [(False, False), (True, False), (True, True)]
    assert (Patience(0.0).is_over(), Patience(0.0).is_gone()) == (True, False)


def test_cells_at_once(bench: Bench, two: list[Cell]) -> None:
    """Both runs are held until both have started."""
    (bench.data / "hold").touch()
    both = [bench.work.run_dir(cell) / "started" for cell in two]

    def release() -> None:
        until(lambda: all(each.exists() for each in both))
        (bench.data / "hold").unlink()

    helper = threading.Thread(target=release)
    helper.start()
    outcome = bench.carry_out(lambda: two, at_once=2)
    helper.join()
    assert outcome.finished == 2


def test_choices_made_on_the_way_open_the_cells_behind_them(bench: Bench, table: Table) -> None:
    plan = TablePlan(table, "", bench.work.measurement)
    outcome = bench.carry_out(plan.cells)
    assert outcome.failed == {}
    assert not any(cell.provisional or bench.work.left(cell) for cell in plan.cells())
    row = plan.headline_row()
    assert row is not None
    assert (row.value, plan.learning_rate(table.row("dense")).value) == ("kmeans", 1.0e-3)


def test_a_provisional_cell_is_never_run(bench: Bench, table: Table) -> None:
    cells = TablePlan(table, "", unmeasured).cells()
    assert bench.carry_out(lambda: cells).finished == 4


def test_two_calls_do_not_share_a_folder(bench: Bench) -> None:
    with bench.work.held(), pytest.raises(WorkInUse, match="another experiment runs in"), bench.work.held():
        pass


def test_the_data_are_known_by_name_and_content(table: Table, tmp_path: Path) -> None:
    found = []
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "documents.jsonl").write_text(text, encoding="utf-8")
        found.append(data_digest(table, folder))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("paths", "with_data", "sentence"),
    [
        (["documents.jsonl"], False, "name their folder with --data"),
        (["none.jsonl"], True, "there is no file none.jsonl in"),
        (["/documents.jsonl"], True, "give it from --data on"),
    ],
)
def test_missing_data_are_told(
    paths: list[str], with_data: bool, sentence: str, document: Any, write_table: Any, tmp_path: Path
) -> None:
    document["experiment"]["corpus"]["source"]["paths"] = paths
    table = load_table(write_table(document))
    with pytest.raises(InvalidConfig, match=sentence):
        data_digest(table, tmp_path if with_data else None)
