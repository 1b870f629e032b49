"""What inner states and partial progress hold, by name: both moments of AdamW, one of Muon."""

from __future__ import annotations

import pytest

from configs.schema import InnerConfig
from model.inner_state import checkpoint_tensors, inner_state_tensors
from model.layout import TensorSpec

PATH = (
    TensorSpec("lm_head.weight", (6, 4)),
    TensorSpec("model.embed_tokens.weight", (6, 4)),
    TensorSpec("model.layers.0.input_layernorm.weight", (4,)),
    TensorSpec("model.layers.0.mlp.down_proj.weight", (4, 8)),
    TensorSpec("model.norm.weight", (4,)),
)
MATRIX = "model.layers.0.mlp.down_proj.weight"
ADAMW, MUON = InnerConfig(), InnerConfig.model_validate({"optimizer": "muon"})


def test_adamw_keeps_two_moments_of_every_tensor() -> None:
    assert inner_state_tensors(ADAMW, PATH) == tuple(
        TensorSpec(f"{moment}.{spec.name}", spec.shape) for moment in "mv" for spec in PATH
    )


def test_muon_keeps_one_moment_of_the_matrices_of_the_blocks_alone() -> None:
    less = [spec for spec in inner_state_tensors(ADAMW, PATH) if spec.name != f"v.{MATRIX}"]
    assert inner_state_tensors(MUON, PATH) == tuple(less)


@pytest.mark.parametrize("inner", [ADAMW, MUON])
def test_partial_progress_is_the_parameters_beside_the_inner_state(inner: InnerConfig) -> None:
    tensors = checkpoint_tensors(inner, PATH)
    names = [spec.name for spec in tensors]
    assert names == sorted(names)
    assert [spec for spec in tensors if not spec.name.startswith("p.")] == list(inner_state_tensors(inner, PATH))
    assert {(spec.name[2:], spec.shape) for spec in tensors if spec.name.startswith("p.")} == {
        (spec.name, spec.shape) for spec in PATH
    }
