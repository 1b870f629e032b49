"""Steps on files: the same bits whatever the order, the chunk, or a restart; bounded memory; refusals."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from configs.schema import OuterConfig
from coordinator.executor import Executor, NonFiniteStep, StepOutcome, distance, step_module
from coordinator.outer import Chunk, NoContributions, add_weighted, contribution_weights, nesterov_step
from coordinator.partial_sum import Contribution, PartialSum
from coordinator.robust import weighted_median, weighted_trimmed_mean
from model import tensor_file
from model.layout import ModuleSpec, TensorSpec
from model.store import BlobStore, UnknownBlob
from model.tensor_file import TensorMismatch

SPEC = ModuleSpec("0.1", (TensorSpec("a", (3, 5)), TensorSpec("b", (7,))))
KEY = ("mixture", "0.1")
OUTER = OuterConfig()
TOKENS = [300, 100, 250, 50]
WEIGHTS = contribution_weights(TOKENS)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def _put(store: BlobStore, flat: npt.NDArray[Any], spec: ModuleSpec = SPEC) -> Path:
    path = store.scratch() / "tensors"
    with tensor_file.Writer(path, spec.tensors) as writer:
        writer.append(flat.astype(np.float32))
        digest, _ = writer.finish()
    store.adopt(path, digest)
    return store.path(digest)


def _random(seed: int, spec: ModuleSpec = SPEC) -> Chunk:
    return np.random.default_rng(seed).standard_normal(spec.num_elements).astype(np.float32)


@pytest.fixture
def params(store: BlobStore) -> Path:
    return _put(store, _random(100))


@pytest.fixture
def contributions(store: BlobStore) -> list[Contribution]:
    return [(weight, _put(store, _random(shard))) for shard, weight in enumerate(WEIGHTS)]


def _step(
    store: BlobStore,
    params: Path,
    contributions: list[Contribution],
    momentum: Path | None = None,
    outer: OuterConfig = OUTER,
    partial: PartialSum | None = None,
    chunk_elements: int = 4,
    spec: ModuleSpec = SPEC,
) -> StepOutcome:
    aside = store.scratch()
    return step_module(
        spec,
        params,
        momentum,
        contributions,
        outer,
        aside / "params",
        aside / "momentum",
        chunk_elements,
        partial=partial,
    )


def test_a_step_on_files_is_the_outer_step_on_flat_vectors(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution]
) -> None:
    executor = Executor(store, tmp_path / "sums")
    first = executor.step(KEY, 0, SPEC, params, None, contributions, OUTER)
    assert first.momentum is not None
    second = executor.step(
        KEY, 1, SPEC, store.path(first.params[0]), store.path(first.momentum[0]), contributions, OUTER
    )
    assert second.momentum is not None

    total: Chunk | None = None
    for shard, weight in enumerate(WEIGHTS):
        total = add_weighted(total, _random(shard), weight)
    assert total is not None
    flat, buffer = nesterov_step(_random(100), None, total, 0.7, 0.9)
    flat, buffer = nesterov_step(flat, buffer, total, 0.7, 0.9)
    np.testing.assert_array_equal(tensor_file.open_flat(store.path(second.params[0]), SPEC.tensors), flat)
    np.testing.assert_array_equal(tensor_file.open_flat(store.path(second.momentum[0]), SPEC.tensors), buffer)
    assert second.outer_gradient_norm == pytest.approx(float(np.linalg.norm(total)), rel=1e-6)
    assert store.size(second.params[0]) == second.params[1]


@pytest.mark.parametrize("arrival", list(itertools.permutations(range(4))))
def test_arrival_order_changes_no_bit(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution], arrival: tuple[int, ...]
) -> None:
    executor = Executor(store, tmp_path / "sums", chunk_elements=4)
    for shard in arrival:
        executor.add(KEY, 0, range(4), shard, *contributions[shard])
    outcome = executor.step(KEY, 0, SPEC, params, None, contributions, OUTER)
    assert outcome == _step(store, params, contributions)
    assert not list((tmp_path / "sums").iterdir())


@pytest.mark.parametrize("chunk_elements", [1, 5, 21, 22, 1000])
def test_chunk_size_changes_no_bit(
    store: BlobStore, params: Path, contributions: list[Contribution], chunk_elements: int
) -> None:
    outcome, reference = (
        _step(store, params, contributions, chunk_elements=elements) for elements in (chunk_elements, 4)
    )
    assert (outcome.params, outcome.momentum) == (reference.params, reference.momentum)


def test_shard_order_is_what_counts_and_not_any_order(store: BlobStore, params: Path) -> None:
    """Guards the tests above: with these numbers another order of addition does change bits."""
    contributions = [(0.25, _put(store, np.full(22, value))) for value in (1e8, 1.0, -1e8, 1.0)]
    assert _step(store, params, contributions).params != _step(store, params, contributions[::-1]).params


@pytest.mark.parametrize("summed", range(1, 5))
def test_a_prefix_summed_before_gives_the_bits_of_a_sum_at_the_end(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution], summed: int
) -> None:
    partial = PartialSum(tmp_path / "sum", SPEC.tensors, chunk_elements=5)
    for contribution in contributions[:summed]:
        partial.add(*contribution)
    assert _step(store, params, contributions, partial=partial) == _step(store, params, contributions)


def test_only_the_contiguous_prefix_is_summed_early(
    store: BlobStore, tmp_path: Path, contributions: list[Contribution]
) -> None:
    executor = Executor(store, tmp_path / "sums")
    executor.add(KEY, 0, [0, 1, 2, 3], 2, *contributions[2])
    assert not list((tmp_path / "sums").iterdir())
    executor.add(KEY, 0, [0, 1, 2, 3], 0, *contributions[0])
    (sum_file,) = (tmp_path / "sums").iterdir()
    np.testing.assert_array_equal(np.fromfile(sum_file, np.float32), add_weighted(None, _random(0), WEIGHTS[0]))
    executor.add(KEY, 0, [0, 1, 2, 3], 1, *contributions[1])
    three: Chunk | None = None
    for shard in range(3):
        three = add_weighted(three, _random(shard), WEIGHTS[shard])
    np.testing.assert_array_equal(np.fromfile(sum_file, np.float32), three)


def test_a_prefix_of_other_contributions_is_not_used(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution]
) -> None:
    partial = PartialSum(tmp_path / "sum", SPEC.tensors)
    partial.add(*contributions[1])
    assert _step(store, params, contributions, partial=partial) == _step(store, params, contributions)


def test_repeated_and_late_additions_change_nothing(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution]
) -> None:
    executor = Executor(store, tmp_path / "sums")
    for shard in (0, 0, 1, 2, 1, 3, 3):
        executor.add(KEY, 0, range(4), shard, *contributions[shard])
    outcome = executor.step(KEY, 0, SPEC, params, None, contributions, OUTER)
    executor.add(KEY, 0, range(4), 0, *contributions[0])
    assert not list((tmp_path / "sums").iterdir())
    assert outcome == _step(store, params, contributions)


def test_after_a_restart_every_contribution_is_read_from_disk(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution]
) -> None:
    before = Executor(store, tmp_path / "sums")
    before.add(KEY, 0, range(4), 0, *contributions[0])
    after = Executor(store, tmp_path / "sums")
    assert not list((tmp_path / "sums").iterdir())
    after.add(KEY, 0, range(4), 3, *contributions[3])
    assert after.step(KEY, 0, SPEC, params, None, contributions, OUTER) == _step(store, params, contributions)


def test_a_failed_addition_leaves_no_half_sum(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution]
) -> None:
    executor = Executor(store, tmp_path / "sums", chunk_elements=4)
    executor.add(KEY, 0, range(4), 0, *contributions[0])
    other = ModuleSpec("0.1", (TensorSpec("a", (3, 5)), TensorSpec("c", (7,))))
    with pytest.raises(TensorMismatch, match="lacks b"):
        executor.add(KEY, 0, range(4), 1, 0.5, _put(store, _random(9, other), other))
    assert executor.step(KEY, 0, SPEC, params, None, contributions, OUTER) == _step(store, params, contributions)


def test_a_step_that_is_repeated_gives_the_same_version(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution]
) -> None:
    first, again = (
        Executor(store, tmp_path / "sums").step(KEY, 0, SPEC, params, None, contributions, OUTER) for _ in range(2)
    )
    assert first == again
    assert not list((store.root / "scratch").iterdir())


def test_sqrt_rescale_multiplies_the_outer_gradient(
    store: BlobStore, params: Path, contributions: list[Contribution]
) -> None:
    plain = _step(store, params, contributions)
    rescaled = _step(store, params, contributions, outer=OuterConfig(rescale="sqrt"))
    assert rescaled.outer_gradient_norm == pytest.approx(2.0 * plain.outer_gradient_norm, rel=1e-6)
    assert rescaled.params != plain.params


ROBUST = [OuterConfig(average="median"), OuterConfig(average="trimmed_mean", trim_share=0.3, rescale="sqrt")]


@pytest.mark.parametrize("outer", ROBUST, ids=["median", "trimmed_mean"])
@pytest.mark.parametrize("chunk_elements", [1, 4, 21, 1000])
def test_robust_averages_take_the_place_of_the_mean(
    store: BlobStore, params: Path, contributions: list[Contribution], outer: OuterConfig, chunk_elements: int
) -> None:
    stacked = np.stack([_random(shard) for shard in range(4)])
    averaged = weighted_median(stacked, WEIGHTS)
    if outer.average == "trimmed_mean":
        averaged = weighted_trimmed_mean(stacked, WEIGHTS, 0.3) * np.float32(2.0)
    stepped, momentum = nesterov_step(_random(100), None, averaged, outer.learning_rate, outer.momentum)
    outcome = _step(store, params, contributions, outer=outer, chunk_elements=chunk_elements)
    assert outcome.momentum is not None
    assert outcome.params[0] == _put(store, stepped).name
    assert outcome.momentum[0] == _put(store, momentum).name


@pytest.mark.parametrize("outer", ROBUST, ids=["median", "trimmed_mean"])
def test_a_huge_contribution_does_not_move_a_robust_step_far(
    store: BlobStore, params: Path, contributions: list[Contribution], outer: OuterConfig
) -> None:
    weights = contribution_weights([1, 1, 1, 1])
    honest = [(weight, path) for weight, (_, path) in zip(weights, contributions, strict=True)]
    lying = [*honest[:3], (weights[3], _put(store, np.full(22, 1e30)))]
    bound = 22**0.5 * float(np.max(np.abs([_random(shard) for shard in range(4)]))) * 2.0
    assert _step(store, params, lying, outer=outer).outer_gradient_norm < bound
    assert _step(store, params, lying).outer_gradient_norm > 1e29


def test_two_contributions_are_averaged_as_a_mean(
    store: BlobStore, params: Path, contributions: list[Contribution]
) -> None:
    two = contributions[:2]
    assert _step(store, params, two, outer=OuterConfig(average="median")).params == _step(store, params, two).params


def test_assign_takes_the_contribution_as_it_is(store: BlobStore, tmp_path: Path, params: Path) -> None:
    end = _put(store, _random(1))
    blobs = set(store.digests())
    outcome = Executor(store, tmp_path / "sums").step(
        KEY, 0, SPEC, params, None, [(1.0, end)], OuterConfig(kind="assign")
    )
    assert outcome.params == (end.name, end.stat().st_size)
    assert outcome.momentum is None
    assert outcome.outer_gradient_norm == pytest.approx(float(np.linalg.norm(_random(100) - _random(1))), rel=1e-6)
    assert set(store.digests()) == blobs


def test_assign_refuses_several_contributions(
    store: BlobStore, tmp_path: Path, params: Path, contributions: list[Contribution]
) -> None:
    executor = Executor(store, tmp_path / "sums")
    with pytest.raises(NoContributions, match=r"takes 1 contribution to module 0\.1, not 4"):
        executor.step(KEY, 0, SPEC, params, None, contributions, OuterConfig(kind="assign"))


def test_assign_refuses_a_file_that_is_not_in_the_store(store: BlobStore, tmp_path: Path, params: Path) -> None:
    loose = tmp_path / "loose"
    tensor_file.write(loose, {"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float32)})
    with pytest.raises(UnknownBlob, match="loose"):
        Executor(store, tmp_path / "sums").step(KEY, 0, SPEC, params, None, [(1.0, loose)], OuterConfig(kind="assign"))


def test_a_step_without_contributions_is_refused(store: BlobStore, params: Path) -> None:
    with pytest.raises(NoContributions, match="at least 1"):
        _step(store, params, [])


def test_tensors_of_another_module_are_refused(store: BlobStore, params: Path) -> None:
    other = ModuleSpec("1.0", (TensorSpec("a", (5, 3)), TensorSpec("b", (7,))))
    with pytest.raises(TensorMismatch, match=r"a has shape \(5, 3\), expected \(3, 5\)"):
        _step(store, params, [(1.0, _put(store, _random(1), other))])


def test_a_step_that_overflows_is_refused_and_leaves_no_blob(store: BlobStore, tmp_path: Path, params: Path) -> None:
    huge = _put(store, np.full(22, 3e38))
    blobs = set(store.digests())
    with pytest.raises(NonFiniteStep, match=r"module 0\.1 is not finite; lower outer\.learning_rate"):
        Executor(store, tmp_path / "sums").step(KEY, 0, SPEC, params, None, [(1.0, huge)], OUTER)
    assert set(store.digests()) == blobs
    assert not list((store.root / "scratch").iterdir())


def test_distance_is_the_norm_of_the_difference(store: BlobStore) -> None:
    start, end = _put(store, np.full(22, 3.0)), _put(store, np.full(22, 1.0))
    assert distance(SPEC, start, end, chunk_elements=5) == pytest.approx(2.0 * 22**0.5)


@pytest.mark.parametrize("average", ["mean", "trimmed_mean", "median"])
@pytest.mark.parametrize("num_contributions", [2, 16])
def test_memory_is_a_few_chunks_whatever_the_module_and_the_contributions(
    store: BlobStore, tmp_path: Path, num_contributions: int, average: Any
) -> None:
    """4 MiB of parameters in chunks of 64 KiB: the peak stays below a megabyte."""
    spec = ModuleSpec("0.0", (TensorSpec("w", (1024, 1024)),))
    params = _put(store, np.zeros(spec.num_elements), spec)
    paths = [_put(store, np.full(spec.num_elements, shard), spec) for shard in range(num_contributions)]
    executor = Executor(store, tmp_path / "sums", chunk_elements=16 * 1024)
    weight = 1.0 / num_contributions
    tracemalloc.start()
    for shard in range(num_contributions // 2 if average == "mean" else 0):
        executor.add(KEY, 0, range(num_contributions), shard, weight, paths[shard])
    executor.step(KEY, 0, spec, params, None, [(weight, path) for path in paths], OuterConfig(average=average))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1024**2
