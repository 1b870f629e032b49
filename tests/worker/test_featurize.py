"""FEATURIZE: samples by hash, features that no neighbour changes, assignments and routes against single prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from corpus.builder import gather_sequences
from corpus.token_file import TokenFile
from model.path import load_path
from protocol.tasks import FeaturizeSpec, MalformedMessage, Numerics
from routing.clusters import Clusters, Group
from routing.features import features_of
from routing.gater import Gater
from routing.positions import sampled_positions
from routing.records import Assignments, Features, Routes, evaluated_positions
from worker.featurize import run_featurize
from worker.task_path import topology_of

if TYPE_CHECKING:
    from tests.worker.conftest import BlobOf, MakeRun, TinyRun

PREFIX = 32


@pytest.fixture
def run(make_run: MakeRun) -> TinyRun:
    return make_run()


@pytest.fixture
def router(run: TinyRun) -> Path:
    """Four centres around the origin of the feature space, two a path."""
    size = run.experiment.model.hidden_size
    centres = np.random.default_rng(2).normal(0, 0.01, (4, size))
    clusters = Clusters(np.zeros(size), np.eye(size), (Group(np.arange(size), centres),), 2, PREFIX)
    path = run.root / "router"
    path.write_bytes(clusters.to_bytes())
    return path


def featurize(run: TinyRun, blob: BlobOf, mode: str, router: Path | None = None, **changes: Any) -> bytes:
    values = {"mode": mode, "base": run.add_modules("base", seed=5), "tokens": blob(run.tokens)}
    values |= {"prefix_tokens": PREFIX, "numerics": Numerics(device="cpu")}
    spec = FeaturizeSpec.model_validate(values | changes)
    outcome = run_featurize(spec, run.experiment, run.vocab_size, run.modules, run.tokens, router, run.root)
    (path,) = outcome.files.values()
    assert list(outcome.files) == list(outcome.result.outputs)
    return path.read_bytes()


def z_alone(run: TinyRun, prefixes: list[np.ndarray]) -> np.ndarray:
    """z of each prefix run by itself, the same mean written out."""
    base = load_path(run.experiment.model, run.vocab_size, topology_of(run.experiment, "base"), run.modules)
    return np.concatenate([features_of(base, [prefix]) for prefix in prefixes])


def test_sample_is_a_function_of_id_and_seed() -> None:
    ids = np.arange(20_000, dtype=np.uint64) + np.uint64(3 << 32)
    chosen = sampled_positions(ids, seed=1, share=0.25)
    assert len(chosen) == pytest.approx(5000, rel=0.05)
    shuffled = np.random.default_rng(0).permutation(ids)
    assert set(ids[chosen]) == set(shuffled[sampled_positions(shuffled, 1, 0.25)])
    assert set(chosen) != set(sampled_positions(ids, 2, 0.25))
    assert set(sampled_positions(ids, 1, 0.1)) < set(chosen)
    assert len(sampled_positions(ids, 1, 1.0)) == len(ids)


def test_sample_holds_features_of_prefixes(run: TinyRun, blob: BlobOf) -> None:
    record = Features.from_bytes(featurize(run, blob, "sample", sample_share=0.5, seed=11))
    with TokenFile.open(run.tokens) as file:
        positions = sampled_positions(file.ids, 11, 0.5)
        assert 0 < len(positions) < file.count
        np.testing.assert_array_equal(record.ids, file.ids[positions])
        expected = z_alone(run, [file.tokens(int(position))[: PREFIX + 1] for position in positions])
    np.testing.assert_allclose(record.z, expected, atol=1e-5)
    assert len(np.unique(record.z, axis=0)) == len(positions)


def test_repeats_bit_for_bit(run: TinyRun, blob: BlobOf) -> None:
    assert featurize(run, blob, "sample") == featurize(run, blob, "sample")


def test_features_do_not_depend_on_what_a_sequence_is_batched_with(run: TinyRun, blob: BlobOf) -> None:
    whole = Features.from_bytes(featurize(run, blob, "sample"))
    some = whole.ids[[1, 8, 20]]
    small = run.root / "some"
    gather_sequences([run.tokens], some, small)
    run.tokens = small
    alone = Features.from_bytes(featurize(run, blob, "sample"))
    np.testing.assert_array_equal(alone.ids, some)
    np.testing.assert_allclose(alone.z, whole.z[[1, 8, 20]], atol=1e-5)


def test_assigns_the_nearest_shards_of_every_sequence(run: TinyRun, blob: BlobOf, router: Path) -> None:
    record = Assignments.from_bytes(featurize(run, blob, "assign", router, top_n=3))
    clusters = Clusters.from_bytes(router.read_bytes())
    with TokenFile.open(run.tokens) as file:
        np.testing.assert_array_equal(record.ids, file.ids)
        z = z_alone(run, [file.tokens(position)[: PREFIX + 1] for position in range(file.count)])
    shards, _ = clusters.nearest(z, 3)
    np.testing.assert_array_equal(record.shards, shards)
    assert len(np.unique(record.shards[:, 0])) > 1


def test_a_gater_assigns_and_routes_like_any_router(run: TinyRun, blob: BlobOf) -> None:
    size = run.experiment.model.hidden_size
    generator = np.random.default_rng(3)
    gater = Gater(np.zeros(size), np.eye(size), generator.normal(0, 9, (size, 3)), np.zeros(3), PREFIX)
    path = run.root / "router"
    path.write_bytes(gater.to_bytes())
    record = Assignments.from_bytes(featurize(run, blob, "assign", path, top_n=9))
    with TokenFile.open(run.tokens) as file:
        z = z_alone(run, [file.tokens(position)[: PREFIX + 1] for position in range(file.count)])
        positions = evaluated_positions(file, 9)
    shards, distances = gater.nearest(z, 3)
    np.testing.assert_array_equal(record.shards, shards)
    np.testing.assert_allclose(record.distances, distances, atol=1e-4)
    assert len(np.unique(record.shards[:, 0])) > 1
    routes = Routes.from_bytes(featurize(run, blob, "route", path, intervals=[16], max_sequences=9))
    np.testing.assert_array_equal(routes.sequence, gater.paths(z[positions]))


def test_routes_sequences_and_chunks_by_the_tokens_before_them(run: TinyRun, blob: BlobOf, router: Path) -> None:
    record = Routes.from_bytes(featurize(run, blob, "route", router, intervals=[16, 40], max_sequences=9))
    clusters = Clusters.from_bytes(router.read_bytes())
    with TokenFile.open(run.tokens) as file:
        positions = evaluated_positions(file, 9)
        np.testing.assert_array_equal(record.positions, positions)
        assert record.num_paths == 2
        assert record.every[16].shape == (9, 6)
        assert record.every[40].shape == (9, 3)
        for line, position in enumerate(positions):
            tokens = file.tokens(int(position))
            z = z_alone(run, [tokens[: PREFIX + 1]])
            assert record.sequence[line] == clusters.paths(z)[0]
            np.testing.assert_allclose(record.posterior[line], clusters.posterior(z)[0], atol=1e-5)
            for interval, paths in record.every.items():
                assert paths[line, 0] == record.sequence[line]
                for chunk in range(1, paths.shape[1]):
                    first_target = PREFIX + 1 + chunk * interval
                    seen = np.append(tokens[:1], tokens[first_target - PREFIX : first_target])
                    reached = first_target < len(tokens)
                    expected = clusters.paths(z_alone(run, [seen]))[0] if reached else record.sequence[line]
                    assert paths[line, chunk] == expected
    assert len(np.unique(record.every[16])) > 1


def test_routing_needs_a_router(run: TinyRun, blob: BlobOf) -> None:
    with pytest.raises(MalformedMessage, match="needs a router"):
        featurize(run, blob, "assign")
