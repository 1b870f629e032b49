"""Names, shapes and sizes of the tensors of a path and of each module, by the Hugging Face names of Llama and Qwen3.

Torch-free: the coordinator checks what arrives against these specs without composing anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import ModelConfig
from model.topology import Level, Topology


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One float32 tensor of a module."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """The tensors of one module, sorted by name: the order of its bytes on the wire and at rest."""

    module_id: str
    tensors: tuple[TensorSpec, ...]

    @property
    def num_elements(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_elements


def block_tensors(model: ModelConfig, block: int) -> list[TensorSpec]:
    """The tensors of one transformer block."""
    prefix = f"model.layers.{block}."
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.heads * model.size_per_head, model.num_kv_heads * model.size_per_head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if model.qk_norm:
        shapes |= {
            "self_attn.q_norm.weight": (model.size_per_head,),
            "self_attn.k_norm.weight": (model.size_per_head,),
        }
    return [TensorSpec(prefix + name, shape) for name, shape in shapes.items()]


def level_tensors(model: ModelConfig, vocab_size: int, level: Level) -> tuple[TensorSpec, ...]:
    """The tensors of any module of `level`, sorted by name."""
    tensors = [tensor for block in level.blocks for tensor in block_tensors(model, block)]
    if level.embedding:
        tensors.append(TensorSpec("model.embed_tokens.weight", (vocab_size, model.hidden_size)))
    if level.head:
        tensors.append(TensorSpec("model.norm.weight", (model.hidden_size,)))
        if not model.tie_embeddings:
            tensors.append(TensorSpec("lm_head.weight", (vocab_size, model.hidden_size)))
    return tuple(sorted(tensors, key=lambda tensor: tensor.name))


def module_spec(model: ModelConfig, vocab_size: int, topology: Topology, module_id: str) -> ModuleSpec:
    """What the module must consist of."""
    return ModuleSpec(module_id, level_tensors(model, vocab_size, topology.level_of_module(module_id)))


def path_tensors(model: ModelConfig, vocab_size: int, topology: Topology) -> tuple[TensorSpec, ...]:
    """The tensors of a whole path (every path of a topology has the same), sorted by name."""
    tensors = [tensor for level in topology.levels for tensor in level_tensors(model, vocab_size, level)]
    return tuple(sorted(tensors, key=lambda tensor: tensor.name))


def num_parameters(model: ModelConfig, vocab_size: int, topology: Topology) -> int:
    """Parameters of one path."""
    return sum(tensor.num_elements for tensor in path_tensors(model, vocab_size, topology))
