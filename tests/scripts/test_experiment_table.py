"""A table is refused in one sentence, before anything is run, wherever one of its cells could not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import InvalidConfig
from scripts.experiment_table import BASE_BUDGET, Table, configured, load_table, routes_of
from tests.scripts.tables import Document


def test_a_row_changes_its_keys_and_nothing_else(table: Table) -> None:
    plain = configured(table, table.row("kmeans"), 0, BASE_BUDGET, None).experiment
    product = configured(table, table.row("product"), 7, BASE_BUDGET, 0.5).experiment
    assert (product.sharding.kind, product.seed, product.inner.learning_rate) == ("product-kmeans", 7, 0.5)
    changed = {
        "sharding": product.sharding.model_copy(update={"kind": "kmeans"}),
        "seed": 0,
        "inner": product.inner.model_copy(update={"learning_rate": plain.inner.learning_rate}),
    }
    assert product.model_copy(update=changed) == plain == table.experiment


def test_a_budget_scales_steps_and_leaves_the_row_as_it_is(table: Table) -> None:
    row = table.row("kmeans")
    for _ in range(2):
        double = configured(table, row, 0, "double", None).experiment
        assert double.pretrain is not None
        assert (double.pretrain.steps, double.phases, double.inner_steps) == (20, 4, 5)
    assert configured(table, row, 0, BASE_BUDGET, None).experiment.phases == 2


def test_what_yaml_shares_between_rows_is_scaled_once(document: Document, write_table: Callable[..., Path]) -> None:
    stages = document["experiment"]["stages"]
    for row in document["rows"]:
        row["overrides"] = {**row.get("overrides", {}), "stages": stages}
    path = write_table(document)
    assert "*id" in path.read_text(encoding="utf-8"), "the file was to have an anchor"
    table = load_table(path)
    for row in table.rows:
        assert configured(table, row, 0, "double", None).experiment.phases == 4


def test_a_model_of_one_path_is_not_routed(table: Table) -> None:
    dense, kmeans = (configured(table, table.row(name), 0, BASE_BUDGET, None) for name in ("dense", "kmeans"))
    assert routes_of(table, table.row("dense"), dense) == ("none",)
    assert routes_of(table, table.row("kmeans"), kmeans)[0] == "sequence"


def change(document: Document, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    section: Any = document
    for parent in parents:
        section = section[int(parent) if parent.isdigit() else parent]
    section[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("rows.1.overrides", {"sharding.kin": "random"}, "row 'kmeans': unknown key experiment.sharding.kin"),
        ("rows.1.overrides", {"shardin.kind": "random"}, "no section experiment.shardin to put 'kind' in"),
        ("rows.1.overrides", {"sharding.kind": "random"}, "row 'kmeans' has no router, which route 'sequence' needs"),
        ("rows.1.routes", ["best"], "route 'best' is none of"),
        ("rows.1.routes", ["sequence", "ensemble:5"], "'ensemble:5' of a topology of 4 paths"),
        (
            "headline.routes",
            ["likelihood:16"],
            "headline.routes has 'likelihood:16', by which no candidate is measured",
        ),
        ("rows.1.routes", ["sequence", "router:16"], "row 'kmeans' has no router stage, which route 'router:16' needs"),
        ("rows.1.model", "dipaco-best", "measures model 'dipaco-best'; its run has dipaco"),
        (
            "rows.0.overrides.sharding",
            {"kind": "all"},
            "row 'dense' has another sharding.prefix_tokens than the table: perplexities would not be comparable (32",
        ),
        ("rows.1.overrides", {"evaluation.max_sequences": 3}, "row 'kmeans' has another evaluation than the table"),
        ("rows.1.model", "dense", "measures model 'dense'; its run has dipaco"),
        ("rows.1.name", "dense", "row 'dense' stands there twice"),
        ("rows.1.tuned_as", "all", "tuned as 'all', which tune.choices does not have"),
        ("reference", "nobody", "reference names 'nobody', which is no row"),
        ("headline.candidates", ["kmeans", "nobody"], "headline.candidates names 'nobody'"),
        ("headline.budgets", ["half"], "headline.budgets names 'half'"),
        ("budgets", {"base": {}}, "budget 'base' is the experiment as it stands"),
        ("budgets.double", {"phases": 0.75}, "train.phases would be 2 x 0.75, which is no whole number"),
        ("seed", 3, "unknown key seed (value 3)"),
        ("experiment.model.blocks", 3, "topology.levels hold blocks"),
    ],
)
def test_it_says_what_is_wrong(
    key: str, value: Any, sentence: str, document: Document, write_table: Callable[..., Path]
) -> None:
    change(document, key, value)
    path = write_table(document)
    with pytest.raises(InvalidConfig) as refused:
        load_table(path)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
