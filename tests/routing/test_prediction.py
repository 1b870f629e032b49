"""Predictions of routes: choices and mixtures computed by hand, and bounds that no table may break."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.routes import UnknownRoute
from routing.prediction import NoRouter, Prediction, predict
from routing.records import Losses, MalformedRecord, Routes
from routing.tables import LossTable, RouteTable

CHUNK = 16
# Three sequences of three chunks (the last of the third is short) under two paths.
LOSS = np.array(
    [
        [[5.0, 4.0], [5.0, 1.0], [2.0, 3.0]],
        [[2.0, 2.5], [9.0, 3.0], [1.0, 8.0]],
        [[3.0, 1.0], [3.0, 1.0], [0.5, 0.25]],
    ]
)
COUNT = np.array([[16, 16, 16], [16, 16, 16], [16, 16, 4]], np.uint32)


def table_of(loss: np.ndarray, count: np.ndarray) -> LossTable:
    sequences = len(loss)
    return LossTable(loss, count, 3 * count, np.zeros(sequences, np.int64), ("prose",))


def routed(posterior: list[list[float]]) -> RouteTable:
    """A router that takes the path with the highest posterior."""
    rows = np.array(posterior, np.float32)
    return RouteTable(rows.argmax(axis=1), rows, {})


TABLE = table_of(LOSS, COUNT)


def chunks_under(choice: list[list[int]]) -> list[list[float]]:
    return [[float(LOSS[i, c, path]) for c, path in enumerate(row)] for i, row in enumerate(choice)]


def test_likelihood_weighs_the_past_against_the_prior() -> None:
    # e^-3 against 1 - e^-3: path 1 must be some 2.95 nats better before it is taken from path 0.
    sure = [1 - math.exp(-3), math.exp(-3)]
    prediction = predict("likelihood:16", TABLE, routed([sure, sure, sure]), CHUNK)
    # Sequence 0: behind by 1, then by 5 nats. Sequence 1: ahead by 0.5, then behind by 5.5. Sequence 2: by 2, then 4.
    assert prediction.losses.tolist() == chunks_under([[0, 0, 1], [0, 0, 1], [0, 0, 1]])
    assert prediction.load.tolist() == pytest.approx([96 / 132, 36 / 132])


def test_likelihood_with_a_flat_prior_takes_the_best_path_so_far() -> None:
    flat = RouteTable(np.array([0, 1, 1]), np.full((3, 2), 0.5, np.float32), {})
    prediction = predict("likelihood:16", TABLE, flat, CHUNK)
    assert prediction.losses.tolist() == chunks_under([[0, 1, 1], [1, 0, 1], [1, 1, 1]])
    assert prediction.load.tolist() == pytest.approx([32 / 132, 100 / 132])


def test_the_router_lm_chooses_a_path_for_every_interval() -> None:
    looks = RouteTable(np.array([0, 1, 1]), np.full((3, 2), 0.5, np.float32), {})
    looks.every[16] = np.array([[0, 1, 0], [1, 0, 1], [1, 1, 0]])
    looks.every[32] = np.array([[0, 1], [1, 0], [1, 1]])
    fine, coarse = (predict(f"router:{interval}", TABLE, None, CHUNK, looks) for interval in (16, 32))
    assert fine.losses.tolist() == chunks_under([[0, 1, 0], [1, 0, 1], [1, 1, 0]])
    assert coarse.losses.tolist() == chunks_under([[0, 0, 1], [1, 1, 0], [1, 1, 1]])
    assert coarse.load.tolist() == pytest.approx([48 / 132, 84 / 132])
    with pytest.raises(NoRouter, match="'router:16' needs a router LM, and this run has none"):
        predict("router:16", TABLE, routed([[0.5, 0.5]] * 3), CHUNK)
    other = RouteTable(looks.sequence, np.full((3, 3), 1 / 3, np.float32), looks.every)
    with pytest.raises(MalformedRecord, match="between 3 paths, the mixture has 2"):
        predict("router:16", TABLE, None, CHUNK, other)


def test_likelihood_keeps_its_path_for_an_interval() -> None:
    prediction = predict("likelihood:32", TABLE, routed([[0.9, 0.1]] * 3), CHUNK)
    assert prediction.losses.tolist() == chunks_under([[0, 0, 1], [0, 0, 1], [0, 0, 1]])
    # A wider interval than the text is the route of a sequence.
    whole = predict("likelihood:48", TABLE, routed([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]), CHUNK)
    assert whole.losses.tolist() == chunks_under([[0, 0, 0], [1, 1, 1], [1, 1, 1]])


def test_a_path_that_the_router_rules_out_can_still_show_that_it_is_right() -> None:
    far = table_of(np.array([[[200.0, 1.0], [200.0, 1.0]]]), np.full((1, 2), 16, np.uint32))
    assert predict("likelihood:16", far, routed([[1.0, 0.0]]), CHUNK).losses.tolist() == [[200.0, 1.0]]
    mixed = predict("ensemble:2", far, routed([[1.0, 0.0]]), CHUNK)
    assert mixed.losses.sum() == pytest.approx(2.0 - math.log(np.finfo(np.float32).smallest_normal))
    assert mixed.load.tolist() == pytest.approx([0.0, 1.0])


def test_an_ensemble_of_two_is_the_mixture_of_their_likelihoods() -> None:
    weights = [[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]]
    prediction = predict("ensemble:2", TABLE, routed(weights), CHUNK)
    responsibility = [0.0, 0.0]
    for i, (first, second) in enumerate(weights):
        for c in range(3):
            one, two = LOSS[i, : c + 1].sum(axis=0)
            so_far = -math.log(first * math.exp(-one) + second * math.exp(-two))
            assert prediction.losses[i, : c + 1].sum() == pytest.approx(so_far)
        mine = first * math.exp(-one) / math.exp(-so_far)
        responsibility[0] += mine * float(COUNT[i].sum()) / 132
        responsibility[1] += (1 - mine) * float(COUNT[i].sum()) / 132
    assert prediction.load.tolist() == pytest.approx(responsibility)


def test_an_ensemble_takes_the_paths_with_the_highest_posterior_and_renormalises_them() -> None:
    loss = np.array([[[7.0, 1.0, 2.0, 0.0]]])
    table = table_of(loss, np.array([[16]], np.uint32))
    routes = routed([[0.1, 0.3, 0.5, 0.1]])
    two = predict("ensemble:2", table, routes, CHUNK)
    assert two.losses.item() == pytest.approx(-math.log((0.3 * math.exp(-1) + 0.5 * math.exp(-2)) / 0.8))
    assert two.load.tolist() == pytest.approx([0.0, 0.3 * math.exp(1) / (0.3 * math.exp(1) + 0.5), *two.load[2:]])
    assert two.load[3] == 0
    # Of 0 and 3, which are alike, the first is the third.
    three = predict("ensemble:3", table, routes, CHUNK)
    likelihood = 0.3 * math.exp(-1) + 0.5 * math.exp(-2) + 0.1 * math.exp(-7)
    assert three.losses.item() == pytest.approx(-math.log(likelihood / 0.9))


# Seed, sequences, chunks, paths, scale of the losses (nats a token), concentration of the posterior.
CASES = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(2, 5),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([0.02, 1.0]),
)
Case = tuple[int, int, int, int, float, float]


def evaluated(case: Case) -> tuple[LossTable, RouteTable]:
    """Tables with chunks of 0 to 16 tokens, and a router's posterior, that follow from a case."""
    seed, sequences, chunks, paths, scale, concentration = case
    generator = np.random.default_rng(seed)
    count = generator.integers(0, CHUNK + 1, (sequences, chunks)).astype(np.uint32)
    loss = generator.gamma(2.0, scale, (sequences, chunks, paths)) * count[:, :, None]
    return table_of(loss, count), routed(generator.dirichlet(np.full(paths, concentration), sequences).tolist())


def total(prediction: Prediction) -> np.ndarray:
    """(N) nats of each sequence."""
    summed: np.ndarray = prediction.losses.sum(axis=1)
    return summed


@settings(max_examples=60, deadline=None)
@given(CASES)
@example((40, 2, 2, 3, 0.01, 0.02))  # a first chunk without tokens, whose loss must be nothing and not a rounding error
def test_what_holds_of_every_table(case: Case) -> None:
    table, routes = evaluated(case)
    first = predict("sequence", table, routes, CHUNK)
    for interval in (CHUNK, 3 * CHUNK):
        likelihood = predict(f"likelihood:{interval}", table, routes, CHUNK)
        width = interval // CHUNK
        np.testing.assert_array_equal(likelihood.losses[:, :width], first.losses[:, :width])
        assert (total(likelihood) >= total(predict(f"oracle:every:{interval}", table, None, CHUNK)) - 1e-9).all()
    sequence_losses = table.loss.sum(axis=1)
    for num_paths in range(2, table.num_paths + 1):
        mixture = predict(f"ensemble:{num_paths}", table, routes, CHUNK)
        slack = 1e-6 * (1 + sequence_losses.max())
        assert (mixture.losses >= -slack).all()
        assert (mixture.losses[table.count == 0] == 0).all()
        assert (total(mixture) >= total(predict("oracle:sequence", table, None, CHUNK)) - slack).all()
        for i in range(len(sequence_losses)):
            members = np.argsort(-routes.posterior[i], kind="stable")[:num_paths]
            weights = routes.posterior[i, members].astype(np.float64)
            with np.errstate(divide="ignore"):
                bounds = sequence_losses[i, members] - np.log(weights / weights.sum())
            assert total(mixture)[i] <= bounds.min() + slack  # never worse than any member by more than log(1/w)
        if table.tokens:
            assert mixture.load.sum() == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_the_mixture_of_a_sequence_does_not_depend_on_the_grid(case: Case) -> None:
    table, routes = evaluated(case)
    coarse = table_of(table.loss.sum(axis=1, keepdims=True), table.count.sum(axis=1, keepdims=True, dtype=np.uint32))
    fine, whole = (predict("ensemble:2", each, routes, CHUNK) for each in (table, coarse))
    np.testing.assert_allclose(total(fine), total(whole), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fine.load, whole.load, atol=1e-9)


def test_a_route_that_the_tables_do_not_offer_is_refused() -> None:
    routes = routed([[0.5, 0.5]] * 3)
    with pytest.raises(UnknownRoute, match=r"'ensemble:3' of a topology of 2 paths: N must be 2\.\.2"):
        predict("ensemble:3", TABLE, routes, CHUNK)
    with pytest.raises(UnknownRoute, match="nothing to mix"):
        predict("ensemble:2", table_of(LOSS[:, :, :1], COUNT), None, CHUNK)
    for route in ("likelihood:16", "ensemble:2"):
        with pytest.raises(NoRouter, match="needs a router"):
            predict(route, TABLE, None, CHUNK)
    with pytest.raises(MalformedRecord, match="between 3 paths, the mixture has 2"):
        predict("sequence", TABLE, routed([[1.0, 0.0, 0.0]] * 3), CHUNK)


def test_one_path_is_every_route() -> None:
    one = table_of(LOSS[:, :, :1], COUNT)
    for route in ("sequence", "every:16", "router:16", "likelihood:16", "oracle:sequence", "oracle:every:16"):
        assert predict(route, one, None, CHUNK).losses.tolist() == LOSS[:, :, 0].tolist()
        assert predict(route, one, None, CHUNK).load.tolist() == [1.0]


def test_a_prefix_that_leaves_nothing_to_count_has_no_losses() -> None:
    nothing = table_of(np.zeros((2, 0, 2)), np.zeros((2, 0), np.uint32))
    for route in ("sequence", "likelihood:16", "ensemble:2", "oracle:sequence"):
        prediction = predict(route, nothing, routed([[0.5, 0.5]] * 2), CHUNK)
        assert prediction.losses.shape == (2, 0)
        assert prediction.load.tolist() == [0.0, 0.0]


def test_files_routed_over_different_numbers_of_paths_are_refused() -> None:
    def record(num_paths: int) -> Routes:
        posterior = np.full((1, num_paths), 1 / num_paths, np.float32)
        return Routes(np.zeros(1, np.uint32), np.zeros(1, np.uint16), posterior, {})

    with pytest.raises(MalformedRecord, match="different numbers of paths"):
        RouteTable.join([record(2), record(3)])
    joined = RouteTable.join([record(2), record(2)])
    assert (joined.num_paths, len(joined.sequence)) == (2, 2)


def test_a_whole_record_is_a_table() -> None:
    record = Losses(np.arange(3, dtype=np.uint32), LOSS[:, :, 0], COUNT, 3 * COUNT, np.zeros(3, np.uint16), ("prose",))
    table = LossTable.join([[record], [record]])
    assert (table.num_paths, table.num_chunks, table.tokens) == (2, 3, 132)
