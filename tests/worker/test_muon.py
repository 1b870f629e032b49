"""Muon against one written out in numpy: the iteration, the momentum, the scale, and AdamW beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import InnerConfig
from worker.inner_optimizer import InnerOptimizer
from worker.muon import orthogonalized

NAMES = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.mlp.up_proj.weight": (12, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 12),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (6, 4),
}
MATRICES = [name for name in NAMES if "_proj" in name]


def muon(**changes: Any) -> InnerConfig:
    return InnerConfig.model_validate({"optimizer": "muon", "weight_decay": 0.5, **changes})


def newton_schulz(update: np.ndarray, steps: int) -> np.ndarray:
    """X <- a X + b (X X') X + c (X X')^2 X from X of norm 1."""
    x = update.astype(np.float64) / np.linalg.norm(update)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (1, 5), (5, 1)])
def test_the_iteration_is_that_of_the_formula(shape: tuple[int, int], steps: int) -> None:
    update = random(*shape)
    found = orthogonalized(torch.from_numpy(update), steps)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), newton_schulz(update, steps), atol=2e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_directions_stay_and_their_lengths_become_alike(shape: tuple[int, int], scale: float) -> None:
    left, _ = np.linalg.qr(random(shape[0], 8, seed=1))
    right, _ = np.linalg.qr(random(shape[1], 8, seed=2))
    update = scale * left @ np.diag(np.geomspace(0.05, 1.0, 8)) @ right.T
    found = orthogonalized(torch.from_numpy(update.astype(np.float32)), 5).numpy()
    turned = left.T @ found @ right
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-3)
    assert np.all((np.diag(turned) > 0.6) & (np.diag(turned) < 1.25)), np.diag(turned)


def test_no_gradient_is_no_update() -> None:
    assert not orthogonalized(torch.zeros(3, 5), 5).any()


class Written:
    """The same optimizer with plain words: Keller Jordan's Muon with a running sum, torch's AdamW for the rest."""

    def __init__(self, tensors: dict[str, torch.nn.Parameter], inner: InnerConfig) -> None:
        self.inner = inner
        self.matrices = {name: tensors[name].detach().numpy().astype(np.float64) for name in MATRICES}
        self.sums = {name: np.zeros(NAMES[name]) for name in MATRICES}
        self.rest = {name: torch.nn.Parameter(tensors[name].detach().clone()) for name in NAMES if name not in MATRICES}
        head = [tensor for name, tensor in self.rest.items() if name == "lm_head.weight"]
        others = [tensor for name, tensor in self.rest.items() if name != "lm_head.weight"]
        groups = [{"params": head, "weight_decay": inner.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=(inner.beta1, inner.beta2), eps=inner.eps)

    def step(self, gradients: dict[str, np.ndarray], rate: float, matrix_rate: float) -> None:
        for name, matrix in self.matrices.items():
            momentum = self.inner.muon.momentum
            self.sums[name] = momentum * self.sums[name] + gradients[name]
            ahead = gradients[name] + momentum * self.sums[name]
            update = newton_schulz(ahead, self.inner.muon.newton_schulz_steps)
            scale = 0.2 * math.sqrt(max(matrix.shape))
            self.matrices[name] = matrix * (1 - matrix_rate * self.inner.weight_decay) - matrix_rate * scale * update
        for name, tensor in self.rest.items():
            tensor.grad = torch.from_numpy(gradients[name].copy())
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [
        ({}, 1.0),
        ({"muon": {"momentum": 0.5, "newton_schulz_steps": 3}}, 1.0),
        ({"learning_rate": 1e-2, "muon": {"learning_rate": 4e-2}}, 4.0),
    ],
)
def test_steps_equal_those_written_out(changes: dict[str, Any], ratio: float) -> None:
    inner = muon(**changes)
    tensors = {name: torch.nn.Parameter(torch.from_numpy(random(*shape, seed=3))) for name, shape in NAMES.items()}
    written = Written(tensors, inner)
    optimizer = InnerOptimizer(tensors, inner)
    for step, rate in enumerate((1e-2, 2e-2, 5e-3, 1e-3)):
        gradients = {name: random(*shape, seed=10 + step) for name, shape in NAMES.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradients[name].copy())
        optimizer.step(rate)
        written.step(gradients, rate, ratio * rate)
        assert all(tensor.grad is None for tensor in tensors.values())
    for name, tensor in tensors.items():
        expected = written.matrices[name] if name in MATRICES else written.rest[name].detach().numpy()
        np.testing.assert_allclose(tensor.detach().numpy(), expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192), (16, 256)])
def test_a_step_moves_a_matrix_of_any_shape_by_a_fifth_of_the_learning_rate(shape: tuple[int, int]) -> None:
    """As far as AdamW's steps do, so that its learning rate and weight decay carry over (2502.16982, Sec 2.2)."""
    name = "model.layers.0.mlp.up_proj.weight"
    matrix = torch.nn.Parameter(torch.zeros(shape))
    matrix.grad = torch.from_numpy(random(*shape))
    InnerOptimizer({name: matrix}, muon()).step(1e-3)
    moved = float(matrix.detach().square().mean().sqrt())
    assert 0.15e-3 < moved < 0.25e-3


def test_the_same_gradients_give_the_same_bits() -> None:
    ends = []
    for _ in range(2):
        tensors = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in NAMES.items()}
        optimizer = InnerOptimizer(tensors, muon())
        for step in range(3):
            for name, tensor in tensors.items():
                tensor.grad = torch.from_numpy(random(*NAMES[name], seed=step))
            optimizer.step(1e-2)
        ends.append(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors.values()))
    assert ends[0] == ends[1]
