"""Which parameters decay, clipping, and a state that only its own model and optimizer can continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import InnerConfig
from model import tensor_file
from model.inner_state import inner_state_tensors
from model.layout import TensorSpec
from worker.inner_optimizer import InnerOptimizer

NAMES = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.0.self_attn.q_norm.weight": (2,),
    "model.norm.weight": (4,),
    "lm_head.weight": (6, 4),
}


OPTIMIZERS = ["adamw", "muon"]


def config(optimizer: str, **changes: Any) -> InnerConfig:
    return InnerConfig.model_validate({"optimizer": optimizer, **changes})


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in NAMES.items()}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_decays_matrices_of_blocks_and_head_only(optimizer_name: str) -> None:
    tensors = parameters()
    optimizer = InnerOptimizer(tensors, config(optimizer_name, weight_decay=0.5))
    for tensor in tensors.values():
        tensor.grad = torch.zeros_like(tensor)  # what moves, moves by decay alone
    optimizer.step(learning_rate=0.1)
    decayed = {name for name, tensor in tensors.items() if not torch.equal(tensor, torch.ones_like(tensor))}
    assert decayed == {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    for name in decayed:
        assert torch.allclose(tensors[name], torch.full(NAMES[name], 0.95))


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 1 / 8), (20.0, 1.0), (None, 1.0)])
def test_clips_the_norm_over_all_parameters(clip_norm: float | None, scale: float) -> None:
    tensors = parameters()
    optimizer = InnerOptimizer(tensors, InnerConfig(clip_norm=clip_norm))
    count = sum(tensor.numel() for tensor in tensors.values())
    for tensor in tensors.values():
        tensor.grad = torch.full_like(tensor, 8 / count**0.5)
    assert float(optimizer.clip()) == pytest.approx(8.0, rel=1e-5)
    for tensor in tensors.values():
        assert tensor.grad is not None
        assert torch.allclose(tensor.grad, torch.tensor(8 / count**0.5 * scale), rtol=1e-4)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_state_has_sorted_flat_moments_and_continues(optimizer_name: str, tmp_path: Path) -> None:
    gradient = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(shape, generator=gradient) for name, shape in NAMES.items()}

    def step(optimizer: InnerOptimizer, tensors: dict[str, torch.nn.Parameter]) -> None:
        for name, tensor in tensors.items():
            tensor.grad = gradients[name].clone()
        optimizer.step(1e-2)

    tensors = parameters()
    inner = config(optimizer_name)
    optimizer = InnerOptimizer(tensors, inner)
    for _ in range(3):
        step(optimizer, tensors)
    optimizer.save(tmp_path / "state")
    expected = inner_state_tensors(inner, [TensorSpec(name, shape) for name, shape in NAMES.items()])
    assert tensor_file.shapes(tmp_path / "state") == {spec.name: spec.shape for spec in expected}
    names = list(tensor_file.shapes(tmp_path / "state"))
    assert names == sorted(names)
    assert optimizer.num_bytes == 4 * tensor_file.num_elements(expected)
    assert all(np.any(values != 0) for values in tensor_file.read(tmp_path / "state").values())

    restored = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}
    continued = InnerOptimizer(restored, inner)
    continued.restore(tmp_path / "state", adam_step=3)
    step(optimizer, tensors)
    step(continued, restored)
    assert all(torch.equal(tensors[name], restored[name]) for name in NAMES)


def test_refuses_the_state_of_another_model(tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "state", {"m.x": torch.zeros(2).numpy(), "v.x": torch.zeros(2).numpy()})
    with pytest.raises(tensor_file.TensorMismatch, match=r"lacks m\.lm_head\.weight"):
        InnerOptimizer(parameters(), InnerConfig()).restore(tmp_path / "state", 1)


@pytest.mark.parametrize(
    ("written", "read", "sentence"),
    [
        ("adamw", "muon", r"v\.model\.layers\.0\.mlp\.up_proj\.weight"),
        ("muon", "adamw", r"lacks v\.model\.layers\.0\.mlp\.up_proj\.weight"),
    ],
)
def test_refuses_the_state_of_another_optimizer(written: str, read: str, sentence: str, tmp_path: Path) -> None:
    InnerOptimizer(parameters(), config(written)).save(tmp_path / "state")
    with pytest.raises(tensor_file.TensorMismatch, match=sentence):
        InnerOptimizer(parameters(), config(read)).restore(tmp_path / "state", 1)
