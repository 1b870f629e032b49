"""Credits, errors and mixtures of a cloze, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dipaco.cloze_items import ClozeItems
from dipaco.cloze_routes import Chosen
from dipaco.cloze_score import credits, likelihoods, scores, standard_error


def test_who_is_likeliest_earns_the_credit_and_ties_share_it() -> None:
    likelihood = np.array([[-1.0, -2, -3, -4], [-2.0, -1, -3, -4], [-1.0, -1, -3, -4], [-1.0, -1, -1, -1]])
    assert credits(likelihood).tolist() == [1.0, 0.0, 0.5, 0.25]


def test_a_standard_error_of_documents_of_one_item_is_the_common_one() -> None:
    credit = np.array([1.0, 0, 0, 1, 1])
    found = standard_error(credit, np.arange(5, dtype=np.uint64))
    assert found == pytest.approx(float(credit.std(ddof=1)) / math.sqrt(5))


def test_items_that_go_alike_count_as_one() -> None:
    """Three documents, every item of which earns the same: as many items as documents, for all that is known."""
    of_documents = np.array([1.0, 0.0, 1.0])
    documents = np.arange(3, dtype=np.uint64)
    alone = standard_error(of_documents, documents)
    assert standard_error(np.repeat(of_documents, 7), np.repeat(documents, 7)) == pytest.approx(alone)
    assert math.isnan(standard_error(np.ones(4), np.zeros(4, np.uint64)))


def test_one_path_and_a_mixture() -> None:
    losses = np.array([[[1.0, 5.0], [2.0, 0.5], [3.0, 3.0], [4.0, 4.0]]])  # (1, 4, 2)
    alone = likelihoods(losses, Chosen.alone(np.array([1])))
    assert alone.tolist() == [[-5.0, -0.5, -3.0, -4.0]]
    mixed = likelihoods(losses, Chosen(np.array([[1, 0]]), np.log([[0.25, 0.75]])))
    expected = [math.log(0.25 * math.exp(-b) + 0.75 * math.exp(-a)) for a, b in losses[0]]
    assert mixed[0] == pytest.approx(expected)


def test_a_path_that_was_not_run_is_not_read() -> None:
    losses = np.full((1, 4, 3), np.nan)
    losses[:, :, 2] = 1.0
    assert np.isfinite(likelihoods(losses, Chosen.alone(np.array([2])))).all()


def test_numbers_overall_and_by_domain() -> None:
    """The first is found by likelihood alone, the second by gain alone, the third by both."""
    items = ClozeItems(
        contexts=np.zeros((3, 2), np.uint32),
        endings=np.zeros((3, 4, 1), np.uint32),
        domains=np.array([0, 2, 2]),
        documents=np.array([1, 2, 3], np.uint64),
        domain_names=("a", "b", "c"),
    )
    behind = np.array([[-1.0, -2, -9, -9], [-2.0, -1, -9, -9], [-1.0, -2, -9, -9]])
    alone = np.array([[-1.0, -9, -9, -9], [-9.0, -1, -9, -9], [-9.0, -2, -9, -9]])
    overall, by_domain = scores(items, behind, alone)
    assert [overall["accuracy"], overall["gain_accuracy"]] == pytest.approx([2 / 3, 2 / 3])
    assert overall["standard_error"] == pytest.approx(1 / 3)
    assert {name: (each["accuracy"], each["gain_accuracy"]) for name, each in by_domain.items()} == {
        "a": (1.0, 0.0),
        "c": (0.5, 1.0),
    }
    assert math.isnan(by_domain["a"]["standard_error"])
