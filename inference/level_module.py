"""One module ready to be run: the weights of its blocks, embedding and head, fused where its file puts them together.

Tensors lie in the file sorted by name, so gate and up, and queries and values, are one matrix each without a copy.

Legend: H hidden size, F inner size, Q queries, K keys, V vocabulary, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from configs.schema import ModelConfig
from inference.precision import Precision, Weight, lower, matrix_bytes
from model.layout import TensorSpec, level_tensors
from model.topology import Level


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """The weights of one block; `queries_values` and `gate_up` are two matrices, one under the other."""

    input_norm: Float[Tensor, " H"]
    queries_values: Weight  # (Q + K, H)
    keys: Weight  # (K, H)
    query_norm: Float[Tensor, " D"] | None
    key_norm: Float[Tensor, " D"] | None
    out: Weight  # (H, Q)
    inner_norm: Float[Tensor, " H"]
    gate_up: Weight  # (2 F, H)
    down: Weight  # (H, F)


@dataclass(frozen=True, slots=True)
class LevelModule:
    """What a module holds; what its level has not is None. `num_bytes` in the precision it is in."""

    blocks: dict[int, BlockWeights]
    embedding: Weight | None  # (V, H)
    final_norm: Float[Tensor, " H"] | None
    head: Weight | None  # (V, H); None where it is tied to the embedding, too
    num_bytes: int


def level_bytes(model: ModelConfig, vocab_size: int, level: Level, precision: Precision) -> int:
    """Bytes of any module of the level in that precision."""
    specs = level_tensors(model, vocab_size, level)
    vectors = sum(4 * spec.num_elements for spec in specs if len(spec.shape) == 1)
    return vectors + sum(matrix_bytes(precision, *spec.shape) for spec in specs if len(spec.shape) == 2)


def level_module(
    flat: Float[Tensor, " N"], specs: Sequence[TensorSpec], level: Level, num_bytes: int, precision: Precision
) -> LevelModule:
    """The module whose tensors lie end to end in `flat`, in the order of `specs`."""
    tensors = _Tensors(flat, specs, precision)
    return LevelModule(
        blocks={block: tensors.block(f"model.layers.{block}.") for block in level.blocks},
        embedding=tensors.matrix("model.embed_tokens.weight") if level.embedding else None,
        final_norm=tensors.vector("model.norm.weight"),
        head=tensors.matrix("lm_head.weight") if "lm_head.weight" in tensors.places else None,
        num_bytes=num_bytes,
    )


class _Tensors:
    """Views of a flat vector by name."""

    def __init__(self, flat: Tensor, specs: Sequence[TensorSpec], precision: Precision) -> None:
        self._flat, self._precision = flat, precision
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}
        begin = 0
        for spec in sorted(specs, key=lambda spec: spec.name):
            self.places[spec.name] = (begin, spec.shape)
            begin += spec.num_elements

    def vector(self, name: str) -> Tensor | None:
        """A gain, or None where the module has none of that name."""
        if name not in self.places:
            return None
        begin, (size,) = self.places[name]
        return self._flat[begin : begin + size].clone()

    def matrix(self, *names: str) -> Weight:
        """One matrix, or several that lie one after the other, as one."""
        begin, (outputs, inputs) = self.places[names[0]]
        for name in names[1:]:
            place, (more, _) = self.places[name]
            assert place == begin + outputs * inputs, f"{name} does not follow {names[0]}"
            outputs += more
        return lower(self._flat[begin : begin + outputs * inputs].view(outputs, inputs), self._precision)

    def gain(self, name: str) -> Tensor:
        found = self.vector(name)
        assert found is not None, name
        return found

    def block(self, prefix: str) -> BlockWeights:
        return BlockWeights(
            input_norm=self.gain(f"{prefix}input_layernorm.weight"),
            queries_values=self.matrix(f"{prefix}self_attn.q_proj.weight", f"{prefix}self_attn.v_proj.weight"),
            keys=self.matrix(f"{prefix}self_attn.k_proj.weight"),
            query_norm=self.vector(f"{prefix}self_attn.q_norm.weight"),
            key_norm=self.vector(f"{prefix}self_attn.k_norm.weight"),
            out=self.matrix(f"{prefix}self_attn.o_proj.weight"),
            inner_norm=self.gain(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.matrix(f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"),
            down=self.matrix(f"{prefix}mlp.down_proj.weight"),
        )
