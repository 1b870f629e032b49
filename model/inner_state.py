"""Which optimizer takes which tensor of a path, and so what an inner state and partial progress hold. Torch-free.

The worker that writes them and the coordinator that checks them before they count read the same rule here.
AdamW keeps `m.<tensor>` and `v.<tensor>`, Muon `m.<tensor>` alone: a matrix costs 4 bytes an element instead of 8.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.schema import InnerConfig
from model.layout import TensorSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def takes_muon(inner: InnerConfig, name: str, num_dimensions: int) -> bool:
    """Whether Muon takes a tensor: the matrices of the blocks, where it is chosen (2505.23725)."""
    return inner.optimizer == "muon" and num_dimensions == 2 and name not in (EMBEDDING, HEAD)


def inner_state_tensors(inner: InnerConfig, path_tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of the inner state of a path, sorted by name."""
    adamw = [spec for spec in path_tensors if not takes_muon(inner, spec.name, len(spec.shape))]
    return _sorted([*_prefixed("m", path_tensors), *_prefixed("v", adamw)])


def checkpoint_tensors(inner: InnerConfig, path_tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of partial progress: the parameters `p.<tensor>` beside the inner state, sorted by name."""
    return _sorted([*inner_state_tensors(inner, path_tensors), *_prefixed("p", path_tensors)])


def _prefixed(prefix: str, tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [TensorSpec(f"{prefix}.{spec.name}", spec.shape) for spec in tensors]


def _sorted(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(sorted(tensors, key=lambda spec: spec.name))
