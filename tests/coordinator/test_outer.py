"""The outer step against torch, against numbers worked out by hand, and against its own invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator.outer import (
    Chunk,
    NoContributions,
    add_weighted,
    contribution_weights,
    gradient_scale,
    nesterov_step,
    squared_norm,
)


def _constant(value: float, elements: int = 5) -> Chunk:
    return np.full(elements, value, dtype=np.float32)


def _weighted_mean(gradients: list[Chunk], weights: tuple[float, ...]) -> Chunk:
    total: Chunk | None = None
    for gradient, weight in zip(gradients, weights, strict=True):
        total = add_weighted(total, gradient, weight)
    assert total is not None
    return total


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=64).filter(any))
def test_weights_of_a_module_sum_to_one_and_follow_the_tokens(tokens: list[int]) -> None:
    weights = contribution_weights(tokens)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    assert all(weight == count / sum(tokens) for weight, count in zip(weights, tokens, strict=True))


def test_weights_are_normalised_over_the_contributions_and_not_over_the_whole_corpus() -> None:
    assert contribution_weights([300, 100]) == (0.75, 0.25)
    assert contribution_weights([7]) == (1.0,)


@pytest.mark.parametrize("tokens", [[], [0, 0], [5, -1]])
def test_weights_need_tokens(tokens: list[int]) -> None:
    with pytest.raises(NoContributions, match="training tokens"):
        contribution_weights(tokens)


def test_sqrt_rescale_multiplies_the_mean_by_the_root_of_the_number_of_contributions() -> None:
    assert gradient_scale(9, "sqrt") == 3.0
    assert gradient_scale(9, "none") == 1.0
    assert gradient_scale(1, "sqrt") == 1.0
    with pytest.raises(NoContributions, match="at least 1"):
        gradient_scale(0, "none")


def test_sqrt_rescale_restores_the_norm_of_independent_outer_gradients() -> None:
    generator = np.random.default_rng(0)
    gradients = [generator.standard_normal(20_000).astype(np.float32) for _ in range(16)]
    mean = _weighted_mean(gradients, contribution_weights([1] * 16))
    rescaled = mean * np.float32(gradient_scale(16, "sqrt"))
    assert squared_norm(rescaled) == pytest.approx(squared_norm(gradients[0]), rel=0.05)


def test_the_step_moves_from_the_start_towards_the_end() -> None:
    start, end = _constant(1.0), _constant(0.0)
    moved, _ = nesterov_step(start, None, start - end, learning_rate=0.1, mu=0.0)
    assert np.all(moved < start), (
        "the sign of the outer gradient broke: it is start minus end, and the step subtracts it"
    )
    np.testing.assert_array_equal(moved, _constant(1.0) - np.float32(0.1))


def test_a_plain_step_of_rate_one_lands_on_the_end() -> None:
    start, end = _constant(0.75), _constant(-0.5)
    landed, _ = nesterov_step(start, None, start - end, learning_rate=1.0, mu=0.0)
    np.testing.assert_array_equal(landed, end)


def test_golden_numbers_of_a_constant_gradient_model() -> None:
    """g = 1 always, lr 0.5, mu 0.5: b = 1, 1.5, 1.75; steps 0.5*(1 + b/2) = 0.75, 0.875, 0.9375 (exact in binary)."""
    params, momentum = _constant(10.0), None
    seen = []
    for _ in range(3):
        params, momentum = nesterov_step(params, momentum, _constant(1.0), learning_rate=0.5, mu=0.5)
        seen.append((float(params[0]), float(momentum[0])))
    assert seen == [(9.25, 1.0), (8.375, 1.5), (7.4375, 1.75)]


def test_golden_numbers_of_two_replicas_with_unequal_shards() -> None:
    """Outer gradients 4 and -4 of shards with 3:1 tokens: mean 2; sqrt(2) * 2 is the rescaled one."""
    mean = _weighted_mean([_constant(4.0), _constant(-4.0)], contribution_weights([300, 100]))
    np.testing.assert_array_equal(mean, _constant(2.0))
    moved, momentum = nesterov_step(_constant(0.0), None, mean, learning_rate=0.5, mu=0.5)
    np.testing.assert_array_equal(momentum, _constant(2.0))
    np.testing.assert_array_equal(moved, _constant(-1.5))


@pytest.mark.parametrize(("learning_rate", "mu"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.8)])
def test_several_steps_equal_torch_sgd_nesterov(learning_rate: float, mu: float) -> None:
    generator = np.random.default_rng(1)
    params = generator.standard_normal(257).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(params.copy()))
    optimizer = torch.optim.SGD([parameter], lr=learning_rate, momentum=mu, nesterov=True)
    momentum: Chunk | None = None
    for _ in range(8):
        gradient = (0.1 * generator.standard_normal(257)).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        params, momentum = nesterov_step(params, momentum, gradient, learning_rate, mu)
        np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=0, atol=1e-6)


def test_no_momentum_equals_a_momentum_of_zeros() -> None:
    gradient = np.random.default_rng(2).standard_normal(33).astype(np.float32)
    without = nesterov_step(_constant(1.0, 33), None, gradient, 0.7, 0.9)
    zeros = nesterov_step(_constant(1.0, 33), _constant(0.0, 33), gradient, 0.7, 0.9)
    for left, right in zip(without, zeros, strict=True):
        np.testing.assert_array_equal(left, right)


def test_inputs_stay_as_they_are_and_results_are_float32() -> None:
    params, momentum, gradient = _constant(1.0), _constant(2.0), _constant(3.0)
    new_params, new_momentum = nesterov_step(params, momentum, gradient, 0.7, 0.9)
    assert new_params.dtype == new_momentum.dtype == add_weighted(gradient, gradient, 0.3).dtype == np.float32
    assert (params[0], momentum[0], gradient[0]) == (1.0, 2.0, 3.0)


@given(st.integers(1, 40))
def test_chunk_size_changes_no_bit(chunk_elements: int) -> None:
    generator = np.random.default_rng(3)
    gradients = [generator.standard_normal(40).astype(np.float32) for _ in range(5)]
    weights = contribution_weights([3, 1, 4, 1, 5])
    whole = _weighted_mean(gradients, weights)
    parts = [
        _weighted_mean([gradient[at : at + chunk_elements] for gradient in gradients], weights)
        for at in range(0, 40, chunk_elements)
    ]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
