"""What a path has read of one sequence: cached keys and values, and hidden states where levels begin.

When the path changes, the blocks before the first one that differs keep what they have; the others are run again from
the hidden states kept at that boundary.

Legend: T new tokens, S tokens read, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from configs.schema import ModelConfig
from model.kv_cache import KVCache
from model.path import share_tensors
from model.topology import Level, Topology
from model.transformer import Attending, PathModel


def first_block_of(level: Level, num_blocks: int) -> int:
    """The first block whose output depends on the level: 0 for the embedding, `num_blocks` for a head alone."""
    if level.embedding:
        return 0
    return min(level.blocks, default=num_blocks)


def attending(path: PathModel, begin: int, length: int, cache: KVCache) -> Attending:
    """`length` tokens that follow `begin` cached ones: each sees all before it and itself."""
    cos, sin = path.rotary(length, torch.arange(begin, begin + length, device=path.cos.device)[None])
    mask = None
    if begin and length > 1:
        mask = torch.full((1, 1, length, begin + length), -torch.inf, device=cos.device).triu_(begin + 1)
    return Attending(cos, sin, mask, causal=begin == 0, cache=cache)


class Context:
    """One sequence of at most `sequence_length` tokens under a path whose modules may be exchanged."""

    def __init__(self, config: ModelConfig, vocab_size: int, topology: Topology, device: torch.device | str = "cpu"):
        self._path = PathModel(config, vocab_size).to(device).eval()
        self._topology = topology
        self._capacity = config.sequence_length
        self._cache = KVCache(config, self._capacity, device=device)
        choices = {first_block_of(level, config.blocks) for level in topology.levels if level.num_modules > 1}
        self._boundaries = sorted({0, *choices} - {config.blocks})
        shape = (1, self._capacity, config.hidden_size)
        self._kept = {block: torch.empty(shape, device=device) for block in self._boundaries if block}
        self._digests: tuple[str, ...] = ()
        self._tokens: list[int] = []
        self._last: Tensor | None = None  # (H): state of the last token after the last block
        self.computed_blocks = 0  # blocks times tokens run so far, for measurements

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens read, BOS first."""
        return tuple(self._tokens)

    @property
    def length(self) -> int:
        return len(self._tokens)

    @torch.inference_mode()
    def use(self, digests: Sequence[str], tensors: Mapping[str, Tensor]) -> int | None:
        """Continue under another path, given the digests of its modules, one a level, and all their tensors.

        Returns the first block that was run again on the tokens read so far; None where no block was.
        """
        blocks = self._path.config.blocks
        changed = [
            first_block_of(level, blocks)
            for level, old, new in zip(
                self._topology.levels, self._digests or [""] * len(digests), digests, strict=True
            )
            if old != new
        ]
        share_tensors(self._path, tensors)
        self._digests = tuple(digests)
        first = min(changed, default=blocks)
        if first == blocks or not self._tokens:
            return None
        self._cache.forget(first)
        hidden = self._kept[first][:, : self.length] if first else self._embedded(self._tokens)
        self._run(hidden, first, begin=0)
        return first

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens; there must be room for them."""
        begin = self.length
        assert tokens
        assert begin + len(tokens) <= self._capacity
        self._run(self._embedded(tokens), 0, begin)
        self._tokens.extend(tokens)

    @torch.inference_mode()
    def restart(self, tokens: Sequence[int]) -> None:
        """Forget everything read and read these tokens instead."""
        self._cache.forget()
        self._tokens.clear()
        self.read(tokens)

    @torch.inference_mode()
    def logits(self) -> Float[np.ndarray, " V"]:
        """Scores of the token that follows those read."""
        assert self._last is not None
        scores: np.ndarray = self._path.logits(self._path.final_norm(self._last)).float().cpu().numpy()
        return scores

    def _embedded(self, tokens: Sequence[int]) -> Tensor:
        return self._path.embed(torch.tensor([list(tokens)], device=self._path.cos.device))  # (1, T, H)

    def _run(self, hidden: Tensor, first: int, begin: int) -> None:
        """Run the blocks from `first` on over tokens that follow `begin` others, keeping states at the boundaries."""
        length = hidden.shape[1]
        shared = attending(self._path, begin, length, self._cache)
        starts = [first, *(block for block in self._boundaries if block > first)]
        for start, end in zip(starts, [*starts[1:], self._path.config.blocks], strict=True):
            if start in self._kept:
                self._kept[start][:, begin : begin + length] = hidden
            hidden = self._path.run_blocks(hidden, shared, start, end)
        self._last = hidden[0, -1]
        self.computed_blocks += length * (self._path.config.blocks - first)
