"""From assignments to shards: which sequences each shard holds, and that none is too small to train on. Torch-free.

Legend: N sequences, S choices of a sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64, UInt32, UInt64

from configs.schema import ShardingConfig
from routing.kmeans import capped_choices
from routing.records import Assignments, ShardManifest

# The sorted sequence ids of every shard; their sizes differ, so no axis has a name.
Shards = list[npt.NDArray[np.uint64]]


class UnusableShards(ValueError):
    """A division that leaves a shard without a batch of its own; the message names the knobs."""


def random_shards(ids: UInt64[np.ndarray, " N"], num_shards: int, seed: int) -> Shards:
    """Equal parts of a seeded permutation of the sorted ids."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    shuffled = np.sort(ids)[generator.permutation(len(ids))]
    return [np.sort(part) for part in np.array_split(shuffled, num_shards)]


def merge(parts: list[Assignments]) -> Assignments:
    """The assignments of all ranges as one, sorted by id."""
    ids = np.concatenate([part.ids for part in parts])
    order = np.argsort(ids, kind="stable")
    return Assignments(
        ids[order],
        np.concatenate([part.shards for part in parts])[order],
        np.concatenate([part.distances for part in parts])[order],
    )


def divide(assignments: Assignments, num_shards: int, config: ShardingConfig) -> Shards:
    """The sorted ids of every shard: each sequence in its `overlap` best, the first of them under the capacity."""
    choices = assignments.shards.astype(np.int64)
    if config.capacity is None:
        first: npt.NDArray[np.int64] = choices[:, 0]
    else:
        first = capped_choices(choices, assignments.distances, num_shards, config.capacity)
    members = [assignments.ids[first == shard] for shard in range(num_shards)]
    taken = first[:, None]
    for _ in range(config.overlap - 1):
        following = _next_choice(choices, taken)
        taken = np.concatenate([taken, following[:, None]], axis=1)
        members = [np.concatenate([ids, assignments.ids[following == s]]) for s, ids in enumerate(members)]
    return [np.sort(ids) for ids in members]


def _next_choice(choices: Int64[np.ndarray, "N S"], taken: Int64[np.ndarray, "N n"]) -> Int64[np.ndarray, " N"]:
    """The best-ranked shard of every row that it is not in yet."""
    free = (choices[:, :, None] != taken[:, None, :]).all(axis=2)
    return np.take_along_axis(choices, free.argmax(axis=1)[:, None], axis=1)[:, 0]


def check_sizes(
    shards: Shards,
    ids: UInt64[np.ndarray, " N"],
    lengths: UInt32[np.ndarray, " N"],
    batch_tokens: int,
) -> list[int]:
    """Tokens of every shard; raises UnusableShards where one has less than a batch (`ids` sorted, with `lengths`)."""
    tokens = [int(lengths[np.searchsorted(ids, members)].sum(dtype=np.int64)) for members in shards]
    small = [shard for shard, held in enumerate(tokens) if held < batch_tokens]
    if small:
        named = ", ".join(f"{shard} ({len(shards[shard])} sequences, {tokens[shard]} tokens)" for shard in small[:5])
        raise UnusableShards(
            f"{len(small)} of {len(shards)} shards are below one batch of {batch_tokens} tokens: {named}; set "
            "sharding.capacity (1.25, say) or another sharding.kind, use fewer paths, lower inner.batch_rows, "
            "or give more documents"
        )
    return tokens


def manifests(shards: Shards, router: str, overlap: int) -> list[ShardManifest]:
    """The identities of the shards under one router version."""
    return [ShardManifest(shard, router, ids, overlap) for shard, ids in enumerate(shards)]
