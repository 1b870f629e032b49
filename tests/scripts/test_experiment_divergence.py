"""A learning rate that diverges comes to no number, for good; whatever else ends a run is tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.journal import Journal
from scripts.experiment_measurement import no_number
from scripts.experiment_page import Circumstances, Section, page
from scripts.experiment_plan import Cell, TablePlan
from scripts.experiment_results import missing, only, result_rows
from scripts.experiment_table import Table
from scripts.experiment_work import Work
from tests.driver import Driver, make_config
from tests.scripts.bench import Bench
from worker.inner_optimizer import NonFiniteStep
from worker.leased_task import reason_of

SENTENCE = "loss nan on path 0 of model 'base' (shard 0, phase 0, step 3): lower inner.learning_rate (8.0)"
DIVERGED = NonFiniteStep(SENTENCE)
SLOW, FAST = 1.0e-3, 3.0e-3


def paused_by(run_dir: Path, *errors: Exception) -> Path:
    """The state of a run that paused since a task failed so on each of its workers; returns its file."""
    run_dir.mkdir()
    config = make_config()
    driver = Driver(config)
    for index, error in enumerate(errors):
        worker = driver.hello(f"worker-{index}")
        task = driver.lease(worker)
        assert task is not None
        driver.commit(
            driver.machine.leases.release(worker, task.task_id, task.fence, reason_of(error), False, driver.now)
        )
    assert driver.machine.state.standing.paused
    journal = Journal(run_dir)
    journal.commit([driver.machine.state.standing])
    journal.set_meta(config=config.model_dump_json())
    journal.close()
    return run_dir / "state.db"


def pause(bench: Bench, cell: Cell, *errors: Exception) -> None:
    """Let the run of a cell end so from now on."""
    (bench.data / "pause").mkdir(exist_ok=True)
    left = bench.data / "pause" / f"{bench.work.folder(cell.digest).name}.db"
    left.write_bytes(paused_by(bench.data / f"paused-{cell.digest[:8]}", *errors).read_bytes())


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ((DIVERGED, DIVERGED, DIVERGED), SENTENCE),
        ((DIVERGED, NonFiniteStep("gradient norm inf on path 1"), DIVERGED), SENTENCE),
        ((DIVERGED, OSError("the disk is full"), DIVERGED), ""),
        ((MemoryError(), MemoryError(), MemoryError()), ""),
        ((ValueError("saw NonFiniteStep: once; NonFiniteStep: twice"),) * 3, ""),
    ],
)
def test_only_steps_that_are_not_finite_are_no_number(
    errors: tuple[Exception, ...], reason: str, tmp_path: Path
) -> None:
    paused_by(tmp_path / "run", *errors)
    assert no_number(tmp_path / "run") == reason


def test_a_run_that_cannot_be_read_has_not_diverged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert no_number(tmp_path / "run") == ""
    (tmp_path / "run" / "state.db").write_bytes(b"no database at all, but long enough to look at" * 100)
    assert no_number(tmp_path / "run") == ""


def test_a_cell_that_diverges_is_not_tried_again_and_another_failure_is(bench: Bench, two: list[Cell]) -> None:
    pause(bench, two[1], DIVERGED, DIVERGED, DIVERGED)
    pause(bench, two[0], *[OSError("the disk is full")] * 3)
    outcome = bench.carry_out(lambda: two)
    assert outcome.no_number == {two[1].digest: SENTENCE}
    assert outcome.failed == {two[0].digest: "run ended with code 1: the coordinator ended with code 1"}
    assert any("lr 0.003, which is not tried again: loss nan" in line for line in bench.said)
    (bench.data / "pause" / f"{bench.work.folder(two[0].digest).name}.db").unlink()
    (bench.data / "calls.jsonl").unlink()
    bench.work = Work(bench.work.root)
    outcome = bench.carry_out(lambda: two)
    assert (outcome.finished, outcome.no_number, outcome.failed) == (1, {}, {})
    assert [call[0] for call in bench.calls()] == ["run", "evaluate"]
    assert two[0].digest[:16] in bench.calls()[0][1]


def test_the_table_goes_on_without_the_learning_rate_that_diverged(bench: Bench, table: Table) -> None:
    plan = TablePlan(table, "", bench.work.measurement)
    pause(bench, plan.cells()[0], DIVERGED, DIVERGED, DIVERGED)
    outcome = bench.carry_out(plan.cells)
    assert (len(outcome.no_number), outcome.failed, outcome.stopped) == (1, {}, False)
    chosen = plan.learning_rate(table.row("dense"))
    assert (chosen.value, chosen.made, chosen.no_number) == (FAST, True, (SLOW,))
    assert not any(cell.provisional or bench.work.left(cell) for cell in plan.cells())
    assert missing(plan, bench.work.measurement) == []
    assert "dense 0.003 (at the edge of the grid; no number at 0.001)" in written(bench, plan)


def test_a_reported_run_without_a_number_is_shown_as_such(bench: Bench, table: Table) -> None:
    plan = TablePlan(table, "", bench.work.measurement)
    bench.carry_out(lambda: plan.cells()[:4])
    product = next(cell for cell in plan.cells() if "tiny/product" in cell.rows and cell.seed == 1)
    pause(bench, product, DIVERGED, DIVERGED, DIVERGED)
    bench.carry_out(plan.cells)
    row = only(result_rows(plan, bench.work.measurement), row="product", seed=1, route="sequence")[0]
    assert (row["no_number"], row["test_perplexity"], row["tokens"]) == (SENTENCE, None, None)
    headline = plan.headline_row()
    assert headline is not None
    assert (headline.value, headline.made) == ("kmeans", True)
    text = written(bench, plan)
    assert "| 0, 1 (no number) |" in text
    assert "Every cell of this table is finished." in text


def written(bench: Bench, plan: TablePlan) -> str:
    known = bench.work.measurement
    return page([Section(plan, result_rows(plan, known), missing(plan, known))], Circumstances("", "", []))
