"""Clusters whose paths share a module are as alike as a grid allows, in the same order every time."""

from __future__ import annotations

from itertools import combinations, permutations, product
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import LevelConfig, ShardingConfig, TopologyConfig
from model.topology import Topology
from routing.arrangement import arrange, arrangement_cost, shared_modules
from routing.clusters import squared_distances
from routing.kmeans import fit


def topology(*modules: int | Literal["path"], replicas: int = 1) -> Topology:
    levels = [LevelConfig(modules=number, blocks=[index]) for index, number in enumerate(modules)]
    return Topology.from_config(TopologyConfig(levels=levels, replicas=replicas))


def cost_by_modules(centres: np.ndarray, grid: Topology) -> float:
    """Squared distances between all pairs of centres within each module, module by module."""
    total = 0.0
    for level in grid.levels:
        if level.num_modules == 1:
            continue
        for module in range(level.num_modules):
            members = [p for p in range(grid.num_paths) if grid.module_indices(p)[level.index] == module]
            total += sum(float(((centres[a] - centres[b]) ** 2).sum()) for a, b in combinations(members, 2))
    return total


def planted(*modules: int, noise: float = 0.2) -> np.ndarray:
    """Centres of a grid in its order: those of a module have a part of their dimensions in common."""
    generator = np.random.default_rng(7)
    parts = [generator.normal(size=(number, 6)) for number in modules]
    exact = [
        np.concatenate([part[i] for part, i in zip(parts, picks, strict=True)])
        for picks in product(*map(range, modules))
    ]
    return np.stack(exact) + noise * generator.normal(size=(len(exact), 6 * len(modules)))


def test_paths_share_a_module_in_a_row_or_a_column() -> None:
    shared = shared_modules(topology(2, 3))
    for a, b in product(range(6), repeat=2):
        expected = 0 if a == b else int(a // 3 == b // 3) + int(a % 3 == b % 3)
        assert shared[a, b] == expected


def test_levels_that_all_paths_or_no_paths_share_do_not_count() -> None:
    assert np.array_equal(shared_modules(topology(1, 2, "path", 3)), shared_modules(topology(2, 3)))


@pytest.mark.parametrize("modules", [(2, 2), (2, 3), (2, 1, 3), (2, 2, 2)])
def test_the_cost_is_the_sum_over_the_pairs_of_every_module(modules: tuple[int, ...]) -> None:
    grid = topology(*modules)
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(grid.num_paths, 4))
    order = generator.permutation(grid.num_paths)
    found = arrangement_cost(order, shared_modules(grid), squared_distances(centres, centres))
    assert found == pytest.approx(cost_by_modules(centres[order], grid))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(2, 2), (2, 3), (3, 2)]), st.integers(0, 2**32 - 1))
def test_no_order_of_a_small_grid_is_better(modules: tuple[int, int], seed: int) -> None:
    grid = topology(*modules)
    centres = np.random.default_rng(seed).normal(size=(grid.num_paths, 3))
    order = arrange(centres, grid)
    assert sorted(order.tolist()) == list(range(grid.num_paths))
    shared, distances = shared_modules(grid), squared_distances(centres, centres)
    least = min(arrangement_cost(np.array(each), shared, distances) for each in permutations(range(grid.num_paths)))
    assert arrangement_cost(order, shared, distances) == pytest.approx(least)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(2, 4), (3, 3), (2, 2, 2), (4, 4)]), st.integers(0, 2**32 - 1))
def test_no_swap_betters_a_larger_grid(modules: tuple[int, ...], seed: int) -> None:
    grid = topology(*modules)
    centres = np.random.default_rng(seed).normal(size=(grid.num_paths, 3))
    order = arrange(centres, grid)
    assert sorted(order.tolist()) == list(range(grid.num_paths))
    cost = cost_by_modules(centres[order], grid)
    for a, b in combinations(range(grid.num_paths), 2):
        swapped = order.copy()
        swapped[[a, b]] = swapped[[b, a]]
        assert cost_by_modules(centres[swapped], grid) >= cost * (1 - 1e-6)


@pytest.mark.parametrize("modules", [(2, 2), (2, 3), (3, 3), (4, 4), (2, 2, 2)])
def test_a_grid_that_was_shuffled_is_found_again(modules: tuple[int, ...]) -> None:
    grid, centres = topology(*modules), planted(*modules)
    shuffled = centres[np.random.default_rng(4).permutation(grid.num_paths)]
    order = arrange(shuffled, grid)
    assert cost_by_modules(shuffled[order], grid) == pytest.approx(cost_by_modules(centres, grid))
    assert cost_by_modules(shuffled, grid) > 1.05 * cost_by_modules(centres, grid)


@pytest.mark.parametrize("modules", [(2, 3), (3, 3)])
def test_the_order_is_the_same_every_time_and_stays_where_none_is_better(modules: tuple[int, int]) -> None:
    grid, centres = topology(*modules), planted(*modules)
    assert arrange(centres, grid).tolist() == list(range(grid.num_paths))
    shuffled = centres[::-1].copy()
    assert np.array_equal(arrange(shuffled, grid), arrange(shuffled, grid))


@pytest.mark.parametrize("modules", [(4,), (9,), (1, "path")])
def test_paths_that_share_nothing_keep_their_order(modules: tuple[int | Literal["path"], ...]) -> None:
    grid = topology(*modules)
    assert arrange(np.random.default_rng(0).normal(size=(grid.num_paths, 3)), grid).tolist() == [*range(grid.num_paths)]


def sample(modules: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and features of 30 sequences around every planted centre."""
    generator = np.random.default_rng(2)
    centres = 8.0 * planted(*modules)
    z = np.repeat(centres, 30, axis=0) + generator.normal(scale=0.1, size=(30 * len(centres), centres.shape[1]))
    return generator.permutation(len(z)).astype(np.uint64), z.astype(np.float32)


@pytest.mark.parametrize("modules", [(2, 3), (3, 3)])
def test_a_fit_arranges_its_clusters(modules: tuple[int, int]) -> None:
    ids, z = sample(modules)
    grid = topology(*modules)
    for seed in range(3):
        centres = fit(ids, z, ShardingConfig(transform="none"), grid, seed).groups[0].centres
        assert cost_by_modules(centres, grid) == pytest.approx(cost_by_modules(8.0 * planted(*modules), grid), rel=0.02)


def test_a_fit_of_replicas_is_left_as_it_is() -> None:
    ids, z = sample((2, 2))
    fitted = fit(ids, z, ShardingConfig(), topology(2, replicas=2), 0)
    assert fitted.num_shards == 4
