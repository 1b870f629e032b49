"""The frozen tables ask for what the comparison needs, and train nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.layout import num_parameters
from model.topology import Topology
from scripts.experiment_plan import TablePlan
from scripts.experiment_table import BASE_BUDGET, Table, configured, load_table, routes_of
from tests.scripts.tables import unmeasured

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))
GRIDS = {"2x2": 4, "4x4": 16, "8x8": 64}


def load(name: str) -> Table:
    return load_table(FOLDER / f"{name}.yaml")


def parameters(table: Table, row: str) -> int:
    """Of one path."""
    experiment = configured(table, table.row(row), 0, BASE_BUDGET, None).experiment
    return num_parameters(experiment.model, experiment.tokenizer.vocab_size, Topology.from_config(experiment.topology))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cell_is_a_run_that_could_begin(path: Path) -> None:
    table = load_table(path)
    plan = TablePlan(table, "", unmeasured)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert table.name == path.stem
    assert len(plan.cells()) >= len(table.rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dense_and_paths_have_the_same_grid_and_a_choice_of_their_own(path: Path) -> None:
    table = load_table(path)
    assert table.tune is not None
    assert table.row(table.reference).tuned_as != table.rows[-1].tuned_as
    assert all(row.tuned_as for row in table.rows)


@pytest.mark.parametrize("name", GRIDS)
def test_every_mixture_has_as_many_shards_as_the_grid_has_paths(name: str) -> None:
    table = load(name)
    for row in table.rows:
        experiment = configured(table, row, 0, BASE_BUDGET, None).experiment
        shards = Topology.from_config(experiment.topology).num_shards
        assert shards == (1 if row.name.startswith("dense") else GRIDS[name]), row.name
        steps = experiment.total_steps
        assert steps == (200 + 600 * GRIDS[name] if row.name == "dense-tokens" else 800), row.name


@pytest.mark.parametrize("name", GRIDS)
def test_the_sizes_are_what_the_labels_say(name: str) -> None:
    table = load(name)
    path = parameters(table, "dense")
    assert path == parameters(table, "kmeans") == 279_232
    assert 1.0 <= parameters(table, "dense-4x") / (4 * path) < 1.02
    mixture = {"2x2": "dense-mixture", "4x4": "dense-4x", "8x8": "dense-mixture"}[name]
    size = int(name[0]) * path  # two levels of that many halves
    assert 1.0 <= parameters(table, mixture) / size < 1.02


@pytest.mark.parametrize("name", ["4x4", "8x8", "muon-2x2"])
def test_dense_runs_are_shared_between_the_tables(name: str) -> None:
    digests = [
        {cell.digest for cell in TablePlan(load(each), "", unmeasured).cells() if _is_dense(cell.rows)}
        for each in ("2x2", name)
    ]
    assert digests[0] & digests[1]


def _is_dense(rows: tuple[str, ...]) -> bool:
    return any(row.endswith("/dense") for row in rows)


@pytest.mark.parametrize("name", ["2x2", "4x4"])
def test_one_balanced_reshard_half_way(name: str) -> None:
    table = load(name)
    for row in ("gater", "gater-best", "gater-overlap"):
        experiment = configured(table, table.row(row), 0, BASE_BUDGET, None).experiment
        assert [stage.phases for stage in experiment.trains] == [6, 6]
        assert [stage.kind for stage in experiment.gated] == ["reshard", "gater"]
        assert [stage.gater.capacity for stage in experiment.reshards] == [1.25]


@pytest.mark.parametrize("name", ["2x2", "4x4"])
def test_a_gater_of_the_final_paths_costs_no_other_training(name: str) -> None:
    table = load(name)
    plain, fitted = (
        configured(table, table.row(row), 0, BASE_BUDGET, None).experiment for row in ("kmeans", "kmeans-gater")
    )
    assert fitted.stages[: len(plain.stages)] == plain.stages
    assert plain.model_copy(update={"stages": fitted.stages}) == fitted.model_copy(
        update={"evaluation": plain.evaluation}
    )


@pytest.mark.parametrize("name", ["2x2", "4x4"])
def test_early_stopping_is_looked_at_in_the_run_without(name: str) -> None:
    rows = [cell.rows for cell in TablePlan(load(name), "", unmeasured).cells()]
    assert (f"{name}/gater", f"{name}/gater-best") in rows


def test_data_parallel_and_diloco_read_the_same_number_of_rows() -> None:
    table = load("diloco")
    for row in table.rows:
        config = configured(table, row, 0, BASE_BUDGET, None)
        experiment = config.experiment
        shards = Topology.from_config(experiment.topology).num_shards
        assert experiment.total_steps * experiment.inner.batch_rows * shards == 3000 * 32
        assert experiment.phases >= 12
        assert routes_of(table, row, config) == ("none",)


def test_all_tables_ask_for_one_cloze() -> None:
    asked = [load_table(path).cloze for path in FILES]
    assert asked[0] is not None
    assert all(each == asked[0] for each in asked)
