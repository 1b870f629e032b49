"""What several texts have been read into: one slot a text, allocated once, reused.

A slot holds keys and values of every block, the states at the blocks where levels with a choice begin, so that the
blocks from there on can be run again under other modules, and the last token's state after the last block.
"""

from __future__ import annotations

import torch

from configs.schema import ModelConfig
from inference.context import first_block_of
from inference.precision import Precision, compute_dtype
from model.topology import Topology


def boundaries_of(config: ModelConfig, topology: Topology) -> tuple[int, ...]:
    """The blocks, but the first, from which a text may have to be run again."""
    choices = {first_block_of(level, config.blocks) for level in topology.levels}
    return tuple(sorted(choices - {0, config.blocks}))


def slot_bytes(config: ModelConfig, topology: Topology, precision: Precision) -> int:
    """Bytes of one slot at its full length."""
    cached = 2 * config.blocks * config.num_kv_heads * config.size_per_head * compute_dtype(precision).itemsize
    kept = 4 * config.hidden_size * len(boundaries_of(config, topology))
    return config.sequence_length * (cached + kept) + 4 * config.hidden_size


class Slots:
    """Buffers of `count` slots (S), of capacity C = `sequence_length` tokens each; memory is touched as it is used."""

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        count: int,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.count = count
        self.num_bytes = count * slot_bytes(config, topology, precision)
        shape = (config.blocks, count, config.num_kv_heads, config.sequence_length, config.size_per_head)
        # Zeros: what is masked is multiplied by zero, which must not meet what is not finite.
        self.keys = torch.zeros(shape, dtype=compute_dtype(precision), device=device)  # (blocks, S, A, C, D)
        self.values = torch.zeros(shape, dtype=compute_dtype(precision), device=device)
        states = (count, config.sequence_length, config.hidden_size)
        self.kept = {block: torch.empty(states, device=device) for block in boundaries_of(config, topology)}
        self.last = torch.empty(count, config.hidden_size, device=device)  # (S, H)

    def clear(self, slot: int, length: int) -> None:
        """Zero the first tokens of a slot whose text may have left numbers that are not finite."""
        self.keys[:, slot, :, :length] = 0
        self.values[:, slot, :, :length] = 0
