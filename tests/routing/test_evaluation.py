"""The numbers of routes through a table of losses, against loops over sequences and chunks written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from routing.evaluation import beside, measures, summarise
from routing.prediction import NoRouter, predict
from routing.records import Losses, MalformedRecord, Routes
from routing.tables import LossTable, RouteTable

N, C, P, CHUNK = 9, 5, 3, 32


def records(seed: int = 0, names: tuple[str, ...] = ("prose", "code")) -> list[Losses]:
    """One record a path over the same sequences; the last chunks of some sequences are short or empty."""
    generator = np.random.default_rng(seed)
    count = np.full((N, C), CHUNK, np.uint32)
    count[::2, -1] = 5
    count[::3, -2:] = 0
    domains = generator.integers(0, 2, N).astype(np.uint16)
    positions = np.arange(N, dtype=np.uint32)
    return [
        Losses(positions, generator.gamma(2.0, 1.5, (N, C)) * count, count, 3 * count, domains, names) for _ in range(P)
    ]


def routes(seed: int = 0) -> Routes:
    generator = np.random.default_rng(seed + 100)
    every = {
        CHUNK: generator.integers(0, P, (N, C)).astype(np.uint16),
        2 * CHUNK: generator.integers(0, P, (N, 3)).astype(np.uint16),
    }
    sequence = generator.integers(0, P, N).astype(np.uint16)
    return Routes(np.arange(N, dtype=np.uint32), sequence, posterior(sequence), every)


def posterior(sequence: np.ndarray) -> np.ndarray:
    """Half of it on the path of a sequence, the rest on all alike."""
    return np.asarray(0.5 * np.eye(P)[sequence] + 0.5 / P, np.float32)


TABLE = LossTable.join([[record] for record in records()])
ROUTES = RouteTable.join([routes()])


def summed(route: str) -> float:
    """The total loss under a route, chunk by chunk."""
    total = 0.0
    for i in range(N):
        loss = TABLE.loss[i]  # (C, P)
        for c in range(C):
            if route == "sequence" or (route.startswith("likelihood") and c < int(route.rpartition(":")[2]) // CHUNK):
                path = int(ROUTES.sequence[i])
            elif route.startswith("likelihood"):
                width = int(route.rpartition(":")[2]) // CHUNK
                before = loss[: c // width * width].sum(axis=0)
                path = int((before - np.log(ROUTES.posterior[i].astype(np.float64))).argmin())
            elif route == "oracle:sequence":
                path = int(loss.sum(axis=0).argmin())
            else:
                width = int(route.rpartition(":")[2]) // CHUNK
                first = c // width * width
                if route.startswith("oracle"):
                    path = int(loss[first : first + width].sum(axis=0).argmin())
                else:
                    path = int(ROUTES.every[width * CHUNK][i, c // width])
            total += float(loss[c, path])
    return total


ALL_ROUTES = ["sequence", "every:32", "every:64", "oracle:sequence", "oracle:every:32", "oracle:every:64"]
ALL_ROUTES += ["likelihood:32", "likelihood:64"]


@pytest.mark.parametrize("route", ALL_ROUTES)
def test_a_route_sums_the_losses_of_the_paths_it_takes(route: str) -> None:
    measured = measures(TABLE, predict(route, TABLE, ROUTES, CHUNK))
    tokens = int(TABLE.count.sum())
    assert measured["perplexity"] == pytest.approx(math.exp(summed(route) / tokens))
    assert measured["bits_per_byte"] == pytest.approx(summed(route) / math.log(2) / (3 * tokens))
    assert sum(measured["path_load"]) == pytest.approx(1.0)


def test_a_finer_oracle_is_never_worse_and_no_route_beats_it() -> None:
    found = {route: measures(TABLE, predict(route, TABLE, ROUTES, CHUNK))["perplexity"] for route in ALL_ROUTES}
    assert found["oracle:every:32"] <= found["oracle:every:64"] <= found["oracle:sequence"] <= found["sequence"]
    assert found["oracle:every:32"] <= found["every:32"]
    assert found["oracle:every:64"] <= found["every:64"]


def test_the_load_of_a_path_is_its_share_of_the_counted_tokens() -> None:
    measured = measures(TABLE, predict("sequence", TABLE, ROUTES, CHUNK))
    tokens = TABLE.count.sum(axis=1)
    expected = [float(tokens[ROUTES.sequence == path].sum() / tokens.sum()) for path in range(P)]
    assert measured["path_load"] == pytest.approx(expected)


def test_domains_are_measured_apart_and_agree_with_the_whole() -> None:
    measured = measures(TABLE, predict("sequence", TABLE, ROUTES, CHUNK))
    logs, tokens = 0.0, 0
    for index, name in enumerate(TABLE.domain_names):
        counted = int(TABLE.count[TABLE.domains == index].sum())
        logs += math.log(measured["per_domain"][name]) * counted
        tokens += counted
        mine = [i for i in range(N) if TABLE.domains[i] == index]
        loss = sum(float(TABLE.loss[i, :, int(ROUTES.sequence[i])].sum()) for i in mine)
        assert measured["per_domain"][name] == pytest.approx(math.exp(loss / counted))
    assert math.exp(logs / tokens) == pytest.approx(measured["perplexity"])


def test_files_that_number_their_domains_differently_are_joined_by_name() -> None:
    here, there = records(0, ("prose", "code")), records(1, ("code", "law"))
    table = LossTable.join([[a, b] for a, b in zip(here, there, strict=True)])
    assert table.domain_names == ("code", "law", "prose")
    expected = [("prose", "code")[d] for d in here[0].domains] + [("code", "law")[d] for d in there[0].domains]
    assert [table.domain_names[index] for index in table.domains] == expected
    assert table.loss.shape == (2 * N, C, P)


def test_paths_that_saw_other_sequences_are_refused() -> None:
    first, second = records()[:2]
    moved = Losses(first.positions + 1, first.loss, first.count, first.text_bytes, first.domains, first.domain_names)
    with pytest.raises(MalformedRecord, match="different sequences"):
        LossTable.join([[moved], [second]])
    fewer = Losses(first.positions, first.loss, first.count // 2, first.text_bytes, first.domains, first.domain_names)
    with pytest.raises(MalformedRecord, match="different sequences"):
        LossTable.join([[fewer], [second]])


def test_what_has_no_tokens_or_bytes_has_no_number_and_a_huge_loss_is_finite() -> None:
    first = records(names=("prose", "code", "law"))[0]
    silent = Losses(first.positions, first.loss * 1e6, first.count, 0 * first.count, first.domains, first.domain_names)
    table = LossTable.join([[silent]])
    measured = measures(table, predict("sequence", table, None, CHUNK))
    assert set(measured["per_domain"]) == {"code", "prose"}
    assert math.isnan(measured["bits_per_byte"])
    assert math.isfinite(measured["perplexity"])


def test_a_summary_names_models_routes_domains_and_agreement() -> None:
    dense = LossTable.join([[records(3)[0]]])
    summary = summarise({"dense": dense, "mixture": TABLE}, "mixture", ROUTES, ALL_ROUTES, CHUNK)
    assert summary["perplexity"]["dense"] == pytest.approx(math.exp(dense.loss.sum() / dense.tokens))
    for route in ALL_ROUTES:
        assert summary["perplexity"]["dipaco"][route] == pytest.approx(math.exp(summed(route) / TABLE.tokens))
    assert summary["tokens"] == TABLE.tokens
    assert set(summary["per_domain"]) == {"code", "prose"}
    assert set(summary["per_domain"]["code"]) == {"dense", "dipaco"}
    best = TABLE.loss.sum(axis=1).argmin(axis=1)
    agreeing = TABLE.count[best == ROUTES.sequence].sum() / TABLE.tokens
    assert summary["oracle_agreement"] == pytest.approx(agreeing)


def test_how_often_a_route_takes_the_best_path_of_its_interval() -> None:
    """Of the counted tokens; against chunk by chunk written out. Mixtures and oracles are not asked."""
    looks = RouteTable.join([routes(seed=7)])
    wanted = [*ALL_ROUTES, "ensemble:2", "router:32", "router:64"]
    summary = summarise({"mixture": TABLE}, "mixture", ROUTES, wanted, CHUNK, looks=looks)
    chosen = ["sequence", "every:32", "every:64", "likelihood:32", "likelihood:64", "router:32", "router:64"]
    assert sorted(summary["route_accuracy"]) == sorted(chosen)
    assert summary["route_accuracy"]["sequence"] == pytest.approx(summary["oracle_agreement"])
    for name, table in (("every", ROUTES), ("router", looks)):
        for width in (1, 2):
            best = 0
            for i in range(N):
                for c in range(C):
                    first = c // width * width
                    oracle = int(TABLE.loss[i, first : first + width].sum(axis=0).argmin())
                    best += int(TABLE.count[i, c]) * (oracle == table.every[width * CHUNK][i, c // width])
            accuracy = summary["route_accuracy"][f"{name}:{width * CHUNK}"]
            assert accuracy == pytest.approx(best / TABLE.tokens)
            assert 0 < accuracy < 1


def test_without_a_router_only_the_oracles_are_measured() -> None:
    summary = summarise({"mixture": TABLE}, "mixture", None, ALL_ROUTES, CHUNK)
    assert set(summary["perplexity"]["dipaco"]) == {route for route in ALL_ROUTES if route.startswith("oracle")}
    with pytest.raises(NoRouter, match="needs a router"):
        predict("sequence", TABLE, None, CHUNK)


def test_a_topology_of_one_path_needs_no_router() -> None:
    table = LossTable.join([[records()[0]]])
    summary = summarise({"mixture": table}, "mixture", None, ALL_ROUTES, CHUNK)
    assert len(set(summary["perplexity"]["dipaco"].values())) == 1
    assert set(summary["perplexity"]["dipaco"]) == set(ALL_ROUTES)


def test_two_versions_of_the_mixture_stand_side_by_side() -> None:
    other = LossTable.join([[record] for record in records(seed=1)])
    last = summarise({"mixture": TABLE}, "mixture", ROUTES, ["sequence"], CHUNK)
    best = summarise({"mixture": other}, "mixture", ROUTES, ["sequence"], CHUNK, "dipaco-best")
    both = beside(last, best)
    for key in ("perplexity", "bits_per_byte"):
        assert both[key] == {"dipaco": last[key]["dipaco"], "dipaco-best": best[key]["dipaco-best"]}
    for domain, models in both["per_domain"].items():
        assert models == {**last["per_domain"][domain], **best["per_domain"].get(domain, {})}
    assert {key: both[key] for key in ("path_load", "oracle_agreement")} == {
        key: last[key] for key in ("path_load", "oracle_agreement")
    }
    assert set(last["perplexity"]) == {"dipaco"}, "neither summary is changed"
