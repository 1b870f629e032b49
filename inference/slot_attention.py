"""Attention of new tokens over the slots they belong to: one token of many slots, or many tokens of one.

The slots of a decoding step are read in place, padded to the longest, in one call for all rows; where padding would
read far more than there is, row by row.

Legend: R rows, T tokens of one slot, N either, A heads, K key heads, G heads that share keys, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from inference.slots import Slots

# A call for one row costs as much as reading so many tokens more; beyond this share padding is dearer than calls.
_CALL_TOKENS = 64
_PADDED_SHARE = 1.5


def reads_padded(slots: Sequence[int], positions: Sequence[int]) -> bool:
    """Whether one call over all slots from the first to the last, as long as the longest, is the cheaper way."""
    span, longest = max(slots) - min(slots) + 1, max(positions) + 1
    tokens = sum(position + 1 for position in positions)
    return span * longest <= _PADDED_SHARE * tokens + _CALL_TOKENS * len(slots)


class RowAttention:
    """One new token of each row; `slots` and `positions` by row."""

    def __init__(self, buffers: Slots, slots: Sequence[int], positions: Sequence[int]) -> None:
        self._buffers, self._rows = buffers, list(zip(slots, positions, strict=True))
        device = buffers.last.device
        self.slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor(positions, device=device)
        self._low, self._high, self._longest = min(slots), max(slots) + 1, max(positions) + 1
        self._padded = reads_padded(slots, positions)
        self._in_place = list(slots) == list(range(self._low, self._high))
        self._mask = self._mask_of(positions) if self._padded and len(slots) > 1 else None

    def _mask_of(self, positions: Sequence[int]) -> Tensor | None:
        """Additive, 0 where a slot has tokens; slots between that are in no row see one token, unread."""
        if self._in_place and min(positions) + 1 == self._longest:
            return None
        lengths = torch.ones(self._high - self._low, dtype=torch.long, device=self.slots.device)
        lengths[self.slots - self._low] = self.positions + 1
        hidden = torch.arange(self._longest, device=lengths.device)[None] >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._buffers.keys.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]  # (S, 1, 1, C)

    def mix(
        self,
        block: int,
        queries: Float[Tensor, "R A D"],
        keys: Float[Tensor, "R K D"],
        values: Float[Tensor, "R K D"],
        order: Tensor | None,
    ) -> Float[Tensor, "R Q"]:
        """Store keys and values, and return what each row's queries find; `order`: which rows these are, if not all."""
        slots = self.slots if order is None else self.slots[order]
        all_keys, all_values = self._buffers.keys[block], self._buffers.values[block]
        if len(self._rows) == 1:
            ((slot, position),) = self._rows
            all_keys[slot, :, position], all_values[slot, :, position] = keys[0], values[0]
        else:
            positions = self.positions if order is None else self.positions[order]
            all_keys[slots, :, positions] = keys.to(all_keys.dtype)
            all_values[slots, :, positions] = values.to(all_values.dtype)
        shape = (len(self._rows), keys.shape[1], -1, keys.shape[2])
        grouped = queries.to(all_keys.dtype).reshape(shape)  # (R, K, G, D)
        mixed = self._padded_mix(grouped, all_keys, all_values, slots, order) if self._padded else None
        if mixed is None:
            mixed = self._mix_by_row(grouped, all_keys, all_values, order)
        return mixed.reshape(len(self._rows), -1)

    def _padded_mix(
        self, queries: Tensor, all_keys: Tensor, all_values: Tensor, slots: Tensor, order: Tensor | None
    ) -> Tensor:
        straight = self._in_place and order is None
        if not straight:
            places = slots - self._low
            spread = queries.new_zeros((self._high - self._low, *queries.shape[1:]))
            spread[places] = queries
            queries = spread
        read = (slice(self._low, self._high), slice(None), slice(self._longest))
        mixed = F.scaled_dot_product_attention(queries, all_keys[read], all_values[read], attn_mask=self._mask)
        return mixed if straight else mixed[places]

    def _mix_by_row(self, queries: Tensor, all_keys: Tensor, all_values: Tensor, order: Tensor | None) -> Tensor:
        rows = self._rows if order is None else [self._rows[place] for place in order.tolist()]
        parts = []
        for row, (slot, position) in enumerate(rows):
            read = (slice(slot, slot + 1), slice(None), slice(position + 1))
            parts.append(F.scaled_dot_product_attention(queries[row : row + 1], all_keys[read], all_values[read]))
        return torch.cat(parts)


class ChunkAttention:
    """Tokens `begin` to `end` of one slot; those before them are in the slot."""

    def __init__(self, buffers: Slots, slot: int, begin: int, end: int) -> None:
        self._buffers, self._slot, self._begin, self._end = buffers, slot, begin, end
        self.positions = torch.arange(begin, end, device=buffers.last.device)
        self._mask: Tensor | None = None
        if begin and end - begin > 1:
            shape = (1, 1, end - begin, end)
            mask = torch.full(shape, -torch.inf, dtype=buffers.keys.dtype, device=buffers.last.device)
            self._mask = mask.triu_(begin + 1)

    def mix(
        self,
        block: int,
        queries: Float[Tensor, "T A D"],
        keys: Float[Tensor, "T K D"],
        values: Float[Tensor, "T K D"],
        order: Tensor | None,
    ) -> Float[Tensor, "T Q"]:
        """Store keys and values, and return what the tokens' queries find. There is one group, so no `order`."""
        assert order is None
        place = slice(self._slot, self._slot + 1)
        all_keys, all_values = self._buffers.keys[block, place], self._buffers.values[block, place]  # (1, K, C, D)
        all_keys[0, :, self._begin : self._end] = keys.transpose(0, 1)
        all_values[0, :, self._begin : self._end] = values.transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            queries.to(all_keys.dtype).transpose(0, 1)[None],
            all_keys[:, :, : self._end],
            all_values[:, :, : self._end],
            attn_mask=self._mask,
            is_causal=self._begin == 0 and self._end > 1,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return mixed[0].transpose(0, 1).flatten(1)
