from __future__ import annotations

from dipaco.table import cell, rows

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
