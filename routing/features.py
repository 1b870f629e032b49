"""Prefix features z: the mean of the last block's states over the first tokens under the frozen base (DiPaCo 7.2.1).

The prefix is run alone, BOS in front, so that a sequence has the same z in sharding, evaluation and serving, whatever
follows it and whatever it is batched with.

Legend: B sequences, L prefix tokens with BOS, H hidden size, D features (= H), N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from model.transformer import PathModel

BATCH_SEQUENCES = 64


@torch.no_grad()
def prefix_features(base: PathModel, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
    """z of prefixes of equal length, BOS first; the tokens after BOS are averaged (BOS itself where it is alone)."""
    states: Tensor = base.block_states(tokens).float()  # (B, L, H)
    return states[:, 1:].mean(dim=1) if tokens.shape[1] > 1 else states[:, 0]


def features_of(
    base: PathModel, prefixes: Sequence[npt.NDArray[Any]], device: torch.device | str = "cpu"
) -> Float32[np.ndarray, "N D"]:
    """z of prefixes of any lengths, BOS and at most prefix_tokens more; batched by length, in order of position."""
    z = np.zeros((len(prefixes), base.config.hidden_size), np.float32)
    lengths = np.array([len(prefix) for prefix in prefixes], np.int64)
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        for start in range(0, len(members), BATCH_SEQUENCES):
            batch = members[start : start + BATCH_SEQUENCES]
            tokens = torch.from_numpy(np.stack([prefixes[index].astype(np.int64) for index in batch])).to(device)
            z[batch] = prefix_features(base, tokens).cpu().numpy()
    return z


def first_prefix(tokens: npt.NDArray[Any], prefix_tokens: int) -> npt.NDArray[Any]:
    """What the router sees of a sequence: BOS and its first tokens."""
    return tokens[: prefix_tokens + 1]


def prefix_before(tokens: npt.NDArray[Any], position: int, prefix_tokens: int) -> npt.NDArray[Any]:
    """What the router sees before `position`: BOS and the last tokens up to it, run alone."""
    return np.concatenate([tokens[:1], tokens[max(1, position - prefix_tokens) : position]])
