"""One path as a torch module: RMSNorm, rotary positions, SwiGLU, grouped-query attention, optional QK-norm.

Tensor for tensor the Llama (with QK-norm: Qwen3) causal LM of transformers, under the same names. Attention restarts
at every sequence of a packed row. Parameters are uninitialised until something loads them (`model.path`).

Legend: B batch rows, T tokens of a row, S tokens in the cache, H hidden size, A heads, D size of a head, N tokens
counted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import ModelConfig
from model.kv_cache import KVCache
from model.linear_cross_entropy import linear_cross_entropy, token_cross_entropy
from model.rms_norm import RMSNorm


@dataclass(frozen=True, slots=True)
class Attending:
    """What every block of one forward pass shares: rotary factors, who sees whom, and the cache, if any."""

    cos: Float[Tensor, "#B T 1 D"]
    sin: Float[Tensor, "#B T 1 D"]
    mask: Float[Tensor, "#B 1 T S"] | None  # None: every token sees all before it in its row
    causal: bool
    cache: KVCache | None = None


def rotary_tables(length: int, head_size: int, theta: float) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """cos and signed sin of position times frequency (RoFormer, 2104.09864), halves side by side as in Llama."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Float[Tensor, "B T A D"], cos: Float[Tensor, "#B T 1 D"], sin: Float[Tensor, "#B T 1 D"]
) -> Float[Tensor, "B T A D"]:
    """Turn every pair (d, d + D/2) by its position's angle; `sin` carries the sign of the first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def one_sequence_per_row(sequence_index: Int[Tensor, "B T"]) -> bool:
    """Whether every row holds one sequence from its first token on (padding, -1, may follow)."""
    return bool(((sequence_index == sequence_index[:, :1]) | (sequence_index < 0)).all())


def block_diagonal_mask(sequence_index: Int[Tensor, "B T"]) -> Float[Tensor, "B 1 T T"]:
    """Additive mask: 0 where a token sees an earlier one of its own sequence, -inf elsewhere."""
    same = sequence_index[:, :, None] == sequence_index[:, None, :]  # (B, T, T)
    mask = torch.full(same.shape, -torch.inf, device=same.device)
    return mask.masked_fill_(same.tril_(), 0.0)[:, None]


class Linear(nn.Linear):
    """Without bias, and not initialised: a path's weights come from its modules."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing. (Skipping it by way of the meta device would import torch's compiler, for more than a second.)"""


class Embedding(nn.Embedding):
    """Not initialised either."""

    def reset_parameters(self) -> None:
        """Nothing."""


class Attention(nn.Module):
    """Causal self-attention in which `heads / kv_heads` queries share a key."""

    def __init__(self, config: ModelConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.head_size = config.size_per_head
        self.shares_keys = config.heads != config.num_kv_heads
        queries, keys = config.heads * self.head_size, config.num_kv_heads * self.head_size
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Float[Tensor, "B T H"], attending: Attending) -> Float[Tensor, "B T H"]:
        heads = (*x.shape[:2], -1, self.head_size)
        queries, keys, values = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = rotate(queries, attending.cos, attending.sin).transpose(1, 2)  # (B, A, T, D)
        keys = rotate(keys, attending.cos, attending.sin).transpose(1, 2)
        values = values.transpose(1, 2)
        if attending.cache is not None:
            keys, values = attending.cache.extend(self.block, keys, values)  # (B, A, S, D)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=attending.mask,
            is_causal=attending.causal,
            enable_gqa=self.shares_keys,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU (2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, block: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, block)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Float[Tensor, "B T H"], attending: Attending) -> Float[Tensor, "B T H"]:
        x = x + self.self_attn(self.input_layernorm(x), attending)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm, under the names that the checkpoint gives them."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, block) for block in range(config.blocks))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class PathModel(nn.Module):
    """A path: a causal LM over `vocab_size` tokens. `checkpoint_activations` trades time for memory in training."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.checkpoint_activations = False
        self.model = Decoder(config, vocab_size)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size)
        cos, sin = rotary_tables(config.sequence_length, config.size_per_head, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"] | None = None,
        sequence_index: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T H"]:
        """Normed hidden states, from which `logits` and the losses are taken; arguments as for `block_states`."""
        return self.final_norm(self.block_states(tokens, positions, sequence_index))

    def block_states(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"] | None = None,
        sequence_index: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T H"]:
        """Output of the last block, before the final norm.

        `positions` are counted within each sequence (None: 0, 1, ... in every row). `sequence_index` tells which
        sequence of the row a token belongs to, -1 for padding (None: one sequence a row).
        """
        packed = sequence_index is not None and not one_sequence_per_row(sequence_index)
        mask = block_diagonal_mask(sequence_index) if packed and sequence_index is not None else None
        cos, sin = self.rotary(tokens.shape[1], positions)
        return self.run_blocks(self.embed(tokens), Attending(cos, sin, mask, causal=mask is None))

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """The input of the first block."""
        out: Tensor = self.model.embed_tokens(tokens)
        return out

    def rotary(
        self, length: int, positions: Int[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "#B T 1 D"], Float[Tensor, "#B T 1 D"]]:
        """Rotary factors of `positions`, or of 0 .. length - 1."""
        if positions is None:
            if length > self.cos.shape[0]:
                raise ValueError(f"{length} tokens exceed model.sequence_length ({self.cos.shape[0]})")
            return self.cos[None, :length, None], self.sin[None, :length, None]
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]

    def run_blocks(
        self, hidden: Float[Tensor, "B T H"], attending: Attending, first: int = 0, last: int | None = None
    ) -> Float[Tensor, "B T H"]:
        """Pass the input of block `first` through the blocks up to, and without, block `last` (None: to the end)."""
        for block in self.model.layers[first:last]:
            if self.checkpoint_activations and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, attending, use_reentrant=False)
            else:
                hidden = block(hidden, attending)
        return hidden

    def final_norm(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... H"]:
        out: Tensor = self.model.norm(hidden)
        return out

    @property
    def head_weight(self) -> Float[Tensor, "V H"]:
        """The matrix of the head: the embedding where they are tied."""
        head: nn.Module = self.model.embed_tokens if self.lm_head is None else self.lm_head
        weight = head.weight
        assert isinstance(weight, Tensor)
        return weight

    def logits(self, hidden: Float[Tensor, "... H"], num_classes: int | None = None) -> Float[Tensor, "... V"]:
        """Scores of the next token from normed hidden states; of the first `num_classes` tokens alone, where set."""
        return F.linear(hidden, self.head_weight if num_classes is None else self.head_weight[:num_classes])

    def token_losses(self, hidden: Float[Tensor, "N H"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Cross-entropy of each target in nats, in float32, without gradients."""
        return token_cross_entropy(hidden, self.head_weight, targets)

    def loss_sum_and_count(
        self,
        hidden: Float[Tensor, "B T H"],
        targets: Int[Tensor, "B T"],
        weights: Bool[Tensor, "B T"],
        num_classes: int | None = None,
    ) -> tuple[Float[Tensor, ""], int]:
        """Summed cross-entropy in nats of the targets whose weight is true, and how many they are.

        `num_classes`: the softmax runs over the first so many tokens of the vocabulary (None: over all).
        """
        counted = weights.flatten().nonzero().squeeze(-1)  # (N,)
        kept = hidden.flatten(0, 1).index_select(0, counted)
        head = self.head_weight if num_classes is None else self.head_weight[:num_classes]
        return linear_cross_entropy(kept, head, targets.flatten()[counted]), counted.numel()
