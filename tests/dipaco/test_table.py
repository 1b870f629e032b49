from __future__ import annotations

from dipaco.table import accuracy_line, cell, evaluation_table, rows

REPORT = {
    "perplexity": {"dense": 10.0, "dipaco": {"sequence": 8.0, "every:32": None}},
    "bits_per_byte": {"dense": 2.0, "dipaco": {"sequence": 1.5}},
}


def test_rows_compare_every_route_with_the_dense_baseline() -> None:
    assert rows(REPORT) == [
        ("dense", 10.0, 1.0, 2.0),
        ("dipaco sequence", 8.0, 0.8, 1.5),
        ("dipaco every:32", None, None, None),
    ]


def test_without_a_dense_baseline_there_is_no_share() -> None:
    assert rows({"perplexity": {"base": 9.0}}) == [("base", 9.0, None, None)]


def test_a_number_that_is_none_leaves_its_cell_empty() -> None:
    assert (cell(None, ".2f"), cell(1.234, ".2f")) == ("", "1.23")


def test_how_often_a_route_is_right_stands_on_one_line_where_it_is_known() -> None:
    report = {**REPORT, "per_domain": {}, "split": "test", "tokens": {"evaluated": 9}}
    assert accuracy_line(report) == ""
    assert len(evaluation_table(report).renderables) == 2
    known = {**report, "route_accuracy": {"every:32": 0.25, "router:32": 0.625}}
    assert accuracy_line(known).endswith("oracle of the same interval does: every:32 25.0%, router:32 62.5%")
    assert str(evaluation_table(known).renderables[1]) == accuracy_line(known)
