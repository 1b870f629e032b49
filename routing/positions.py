"""What a task reads of a token file and what its losses count, as both sides must find it. Pure, torch-free.

Legend: N sequences, S sampled ones, C chunks of the loss grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64, UInt32, UInt64


def sampled_positions(ids: UInt64[np.ndarray, " N"], seed: int, share: float) -> Int64[np.ndarray, " S"]:
    """Positions of the ids whose hash with the seed falls below `share`: the same whatever file an id stands in."""
    shares = (hashes(ids, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    below: np.ndarray = np.flatnonzero(shares < share)
    return below


def hashes(ids: UInt64[np.ndarray, " N"], seed: int) -> UInt64[np.ndarray, " N"]:
    """Of every id with the seed: the finaliser of SplitMix64 (Steele et al. 2014), twice."""
    hashed: np.ndarray = _mixed(_mixed(ids) ^ np.uint64(seed % 2**64))
    return hashed


def _mixed(values: np.ndarray) -> np.ndarray:
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def num_chunks(sequence_length: int, prefix_tokens: int, chunk_tokens: int) -> int:
    """Chunks of `chunk_tokens` targets after the prefix that the longest sequence reaches."""
    return -(-(sequence_length - 1 - prefix_tokens) // chunk_tokens)


def counted_targets(
    lengths: npt.NDArray[Any], sequence_length: int, prefix_tokens: int, chunk_tokens: int
) -> UInt32[np.ndarray, "N C"]:
    """How many targets of sequences of these lengths (BOS included) fall into each chunk after the prefix."""
    after_prefix = np.asarray(lengths, np.int64)[:, None] - 1 - prefix_tokens
    before_chunk = chunk_tokens * np.arange(num_chunks(sequence_length, prefix_tokens, chunk_tokens))
    counts: np.ndarray = np.clip(after_prefix - before_chunk, 0, chunk_tokens).astype(np.uint32)
    return counts
