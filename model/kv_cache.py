"""Keys and values of the tokens a path has read, block by block, in buffers of fixed capacity.

Legend: B sequences, A key heads, T new tokens, S all tokens, D size of a head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from configs.schema import ModelConfig


class KVCache:
    """Each block counts its own tokens, so that some blocks can be computed anew while the others keep theirs."""

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.blocks, batch, config.num_kv_heads, capacity, config.size_per_head)
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)
        self._lengths = [0] * config.blocks

    def length(self, block: int) -> int:
        """Tokens of which the block holds keys and values."""
        return self._lengths[block]

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def forget(self, first_block: int = 0) -> None:
        """Drop all tokens of the blocks from `first_block` on."""
        self._lengths[first_block:] = [0] * (len(self._lengths) - first_block)

    def extend(
        self, block: int, keys: Float[Tensor, "B A T D"], values: Float[Tensor, "B A T D"]
    ) -> tuple[Float[Tensor, "B A S D"], Float[Tensor, "B A S D"]]:
        """Append to the block's tokens; returns views of all of them."""
        begin = self._lengths[block]
        end = begin + keys.shape[2]
        self._keys[block, :, :, begin:end] = keys
        self._values[block, :, :, begin:end] = values
        self._lengths[block] = end
        return self._keys[block, :, :, :end], self._values[block, :, :, :end]
