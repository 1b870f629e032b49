"""A path as a GGUF file of float32 tensors, which llama.cpp and what is built on it load: architecture llama or qwen3.

Needs the package gguf (extra `export`). Follows llama.cpp's own converter of Hugging Face checkpoints.

Legend: A heads, D size of a head, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32

from configs.schema import ModelConfig
from model.store import fsync_path

_OF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OF_PATH = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ALL_F32 = 0  # general.file_type


class MissingExtra(ValueError):
    """A package that writing GGUF needs is not installed; the message says how to get it."""


class Vocabulary(Protocol):
    """What of a tokenizer goes into the file (corpus.gguf_vocabulary)."""

    @property
    def pre_tokenizer(self) -> str: ...
    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def kinds(self) -> Sequence[int]: ...
    @property
    def merges(self) -> Sequence[str]: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...


def require_gguf() -> Any:
    """The package gguf; raises MissingExtra."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("--format gguf needs the package gguf: pip install 'dipaco[export]'") from None
    return gguf


def architecture(model: ModelConfig) -> str:
    """llama.cpp's name of what a path computes."""
    return "qwen3" if model.qk_norm else "llama"


def gguf_name(tensor: str) -> str:
    """A tensor's name in GGUF: blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
    stem = tensor.removesuffix(".weight")
    if stem in _OF_PATH:
        return f"{_OF_PATH[stem]}.weight"
    block, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{_OF_BLOCK[part]}.weight"


def interleaved(weight: Float32[np.ndarray, "AD H"], heads: int) -> Float32[np.ndarray, "AD H"]:
    """Rows of a query or key matrix for the rotary positions of architecture llama.

    They turn pairs of neighbours (2d, 2d + 1), where ours turn the pairs (d, d + D/2) of the halves.
    """
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, weight.shape[1])  # (A, 2, D/2, H)
    rows: np.ndarray = halves.swapaxes(1, 2).reshape(weight.shape)
    return rows


def write_gguf(
    file: Path, model: ModelConfig, tensors: Mapping[str, np.ndarray], vocabulary: Vocabulary, name: str
) -> None:
    """Write a path (`model.path.compose`) with its tokenizer, durably; raises MissingExtra."""
    gguf = require_gguf()
    writer = gguf.GGUFWriter(file, architecture(model))
    try:
        _add_shape(writer, model, len(vocabulary.tokens), name)
        _add_vocabulary(writer, vocabulary)
        for tensor in sorted(tensors):
            writer.add_tensor(gguf_name(tensor), np.ascontiguousarray(_values(tensor, tensors[tensor], model)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    fsync_path(file)


def _values(name: str, values: np.ndarray, model: ModelConfig) -> np.ndarray:
    if architecture(model) == "llama" and name.endswith("q_proj.weight"):
        return interleaved(values, model.heads)
    if architecture(model) == "llama" and name.endswith("k_proj.weight"):
        return interleaved(values, model.num_kv_heads)
    return values


def _add_shape(writer: Any, model: ModelConfig, vocab_size: int, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_ALL_F32)
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(model.sequence_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.blocks)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.size_per_head)
    writer.add_value_length(model.size_per_head)
    writer.add_rope_dimension_count(model.size_per_head)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    writer.add_token_merges(list(vocabulary.merges))
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
