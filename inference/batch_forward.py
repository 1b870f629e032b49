"""The forward of many texts at once: rows that share a module share its products, level by level.

Between levels rows are regrouped by the module that they go on with. Rows of different paths attend together, each over
its own slot at its own position.

Legend: R rows, T tokens of one row, N either, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from configs.schema import ModelConfig
from inference.level_module import BlockWeights, LevelModule
from inference.precision import project, rows_of
from inference.slot_attention import ChunkAttention, RowAttention
from inference.slots import Slots
from model.topology import Topology
from model.transformer import rotary_tables, rotate


@dataclass(frozen=True, slots=True)
class Row:
    """One token to be read at `position` of a slot under modules, one a level; equal digests are equal modules."""

    slot: int
    position: int
    token: int
    digests: tuple[str, ...]
    modules: tuple[LevelModule, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring rows that go through one module."""

    begin: int
    end: int
    module: LevelModule


@dataclass(frozen=True, slots=True)
class _Grouping:
    """Rows by module: `order` brings them together (None: they are), `back` undoes it."""

    groups: tuple[_Group, ...]
    order: Tensor | None = None
    back: Tensor | None = None

    def apply(self, x: Tensor, run: Callable[[Tensor, LevelModule], Tensor]) -> Tensor:
        """`run` on each group's part of x (N first), put together in the rows' own order."""
        if len(self.groups) == 1:
            return run(x, self.groups[0].module)
        if self.order is not None:
            x = x[self.order]
        out = torch.cat([run(x[group.begin : group.end], group.module) for group in self.groups])
        return out if self.back is None else out[self.back]


def _grouping(rows: Sequence[Row], level: int, device: torch.device) -> _Grouping:
    order = sorted(range(len(rows)), key=lambda row: rows[row].digests[level])
    groups, begin = [], 0
    for _, members in groupby(order, key=lambda row: rows[row].digests[level]):
        found = list(members)
        groups.append(_Group(begin, begin + len(found), rows[found[0]].modules[level]))
        begin += len(found)
    if order == list(range(len(rows))):
        return _Grouping(tuple(groups))
    forth = torch.tensor(order, device=device)
    return _Grouping(tuple(groups), forth, forth.argsort())


@dataclass(frozen=True, slots=True)
class _Segment:
    """Neighbouring blocks of one level."""

    level: int
    first: int
    last: int


def _segments(topology: Topology, blocks: int) -> list[_Segment]:
    level_of = {block: level.index for level in topology.levels for block in level.blocks}
    segments = []
    for level, members in groupby(range(blocks), key=level_of.__getitem__):
        found = list(members)
        segments.append(_Segment(level, found[0], found[-1] + 1))
    return segments


class BatchForward:
    """Reads tokens into slots under modules that are given with them."""

    def __init__(self, config: ModelConfig, topology: Topology, slots: Slots) -> None:
        self._config, self._slots = config, slots
        self._segments = _segments(topology, config.blocks)
        self._embedding_level = next(level.index for level in topology.levels if level.embedding)
        self._head_level = next(level.index for level in topology.levels if level.head)
        self._device = slots.last.device
        tables = rotary_tables(config.sequence_length, config.size_per_head, config.rope_theta)
        self._cos, self._sin = (table.to(self._device) for table in tables)

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> Float[np.ndarray, "R V"]:
        """Read one token of every row; returns scores of the tokens that follow."""
        attention = RowAttention(self._slots, [row.slot for row in rows], [row.position for row in rows])
        groupings = [_grouping(rows, level, self._device) for level in range(len(rows[0].modules))]
        tokens = torch.tensor([row.token for row in rows], device=self._device)
        hidden = groupings[self._embedding_level].apply(tokens, _embed)  # (R, H)
        turns = self._cos[attention.positions][:, None], self._sin[attention.positions][:, None]
        for segment in self._segments:
            grouping = groupings[segment.level]
            if segment.first in self._slots.kept:
                self._slots.kept[segment.first][attention.slots, attention.positions] = hidden
            hidden = self._run(segment.first, segment.last, hidden, grouping, attention, turns)
        self._slots.last[attention.slots] = hidden
        return self._scores(hidden, groupings)

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int], first: int, begin: int, modules: Sequence[LevelModule]) -> None:
        """Run blocks from `first` on over `tokens`, which follow `begin` others in the slot.

        With `first` above 0 their states there must have been kept.
        """
        end = begin + len(tokens)
        attention = ChunkAttention(self._slots, slot, begin, end)
        turns = self._cos[begin:end, None], self._sin[begin:end, None]
        if first:
            hidden = self._slots.kept[first][slot, begin:end].clone()
        else:
            hidden = _embed(torch.tensor(tokens, device=self._device), modules[self._embedding_level])  # (T, H)
        for segment in self._segments:
            if segment.last <= first:
                continue
            start = max(first, segment.first)
            if start in self._slots.kept and start > first:
                self._slots.kept[start][slot, begin:end] = hidden
            grouping = _Grouping((_Group(0, len(tokens), modules[segment.level]),))
            hidden = self._run(start, segment.last, hidden, grouping, attention, turns)
        self._slots.last[slot] = hidden[-1]

    @torch.inference_mode()
    def scores(self, slot: int, modules: Sequence[LevelModule]) -> Float[np.ndarray, " V"]:
        """Scores of the token that follows the last one read into the slot."""
        groupings = [_Grouping((_Group(0, 1, module),)) for module in modules]
        found: np.ndarray = self._scores(self._slots.last[slot : slot + 1], groupings)[0]
        return found

    def _scores(self, hidden: Tensor, groupings: Sequence[_Grouping]) -> np.ndarray:
        normed = groupings[self._head_level].apply(hidden, self._final_norm)
        level = self._embedding_level if self._config.tie_embeddings else self._head_level
        scores: np.ndarray = groupings[level].apply(normed, _head).cpu().numpy()
        return scores

    def _final_norm(self, hidden: Tensor, module: LevelModule) -> Tensor:
        assert module.final_norm is not None
        return F.rms_norm(hidden, module.final_norm.shape, module.final_norm, self._config.norm_eps)

    def _run(
        self,
        first: int,
        last: int,
        hidden: Tensor,
        grouping: _Grouping,
        attention: RowAttention | ChunkAttention,
        turns: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Blocks `first` to `last` of one level; hidden (N, H) is in the rows' own order before and after."""
        order, groups = grouping.order, grouping.groups
        hidden = hidden.clone() if order is None else hidden[order]
        cos, sin = turns if order is None else (turns[0][order], turns[1][order])
        for block in range(first, last):
            parts = [(hidden[group.begin : group.end], group.module.blocks[block]) for group in groups]
            projected = [self._project(part, weights) for part, weights in parts]
            queries, keys, values = (
                (each[0] if len(projected) == 1 else torch.cat(each)) for each in zip(*projected, strict=True)
            )
            turned = rotate(torch.cat((queries, keys), dim=1)[None], cos[None], sin[None])[0]
            heads = self._config.heads
            mixed = attention.mix(block, turned[:, :heads], turned[:, heads:], values, order)
            for group, (part, weights) in zip(groups, parts, strict=True):
                part += project(mixed[group.begin : group.end], weights.out)
                self._feed_forward(part, weights)
        return hidden if grouping.back is None else hidden[grouping.back]

    def _project(self, hidden: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, A, D), keys and values (N, K, D), not yet rotated."""
        config = self._config
        normed = F.rms_norm(hidden, weights.input_norm.shape, weights.input_norm, config.norm_eps)
        heads = (len(hidden), -1, config.size_per_head)
        both, keys = project(normed, weights.queries_values).view(heads), project(normed, weights.keys).view(heads)
        queries, values = both[:, : config.heads], both[:, config.heads :]
        if weights.query_norm is not None and weights.key_norm is not None:
            queries = F.rms_norm(queries.float(), weights.query_norm.shape, weights.query_norm, config.norm_eps)
            keys = F.rms_norm(keys.float(), weights.key_norm.shape, weights.key_norm, config.norm_eps)
        return queries.float(), keys.float(), values

    def _feed_forward(self, hidden: Tensor, weights: BlockWeights) -> None:
        """SwiGLU, added to `hidden` in place."""
        normed = F.rms_norm(hidden, weights.inner_norm.shape, weights.inner_norm, self._config.norm_eps)
        gate, up = project(normed, weights.gate_up).chunk(2, dim=-1)
        hidden += project(F.silu(gate).mul_(up), weights.down)


def _embed(tokens: Tensor, module: LevelModule) -> Tensor:
    assert module.embedding is not None
    return rows_of(module.embedding, tokens)


def _head(normed: Tensor, module: LevelModule) -> Tensor:
    weight = module.embedding if module.head is None else module.head
    assert weight is not None
    return project(normed, weight).float()
