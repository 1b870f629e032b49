"""How many bytes a task needs on a worker: what a lease is weighed against. Pure arithmetic on the shape of a path.

An estimate from above, for float32 master weights: parameters, gradients, the inner optimizer's m and v, the copy of
the start that the outer gradient is taken from, and the activations of one micro batch. Interpreter and libraries are
not counted: a worker offers what is free after they are loaded.

Legend: H hidden size, I intermediate size, Q queries and K keys of a token (heads times head size), V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from configs.schema import InnerConfig, ModelConfig
from model.inner_state import takes_muon
from model.layout import TensorSpec, level_tensors
from model.topology import Level

Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda", "mps"]

# Copies of the parameters while training: themselves, gradients, AdamW's m and v, the start, one temporary of a step.
_TRAIN_COPIES = 6
# Copies of a matrix that Muon works with at once: the gradient ahead, two steps of the iteration, three square ones.
_MUON_COPIES = 6
_ADAMW = InnerConfig()
# Copies while reading only: the model, and the file they are loaded from.
_READ_COPIES = 2
# Sequences that a worker runs at once where it keeps no activations.
_READ_ROWS = 8
# Logits that exist at once at most (model/linear_cross_entropy.py).
_LOGITS_ON_CPU, _LOGITS = 2**18, 2**27
# Token files, buffers and allocator slack.
_OVERHEAD_BYTES = 32 * 1024**2


def train_bytes(
    model: ModelConfig,
    vocab_size: int,
    rows: int,
    sequence_length: int | None = None,
    dtype: Dtype = "auto",
    checkpoint_activations: bool = False,
    device: Device = "auto",
    inner: InnerConfig = _ADAMW,
) -> int:
    """Bytes that inner steps on one path need with micro batches of `rows` rows of `sequence_length` tokens."""
    length = sequence_length or model.sequence_length
    tokens = rows * length
    block = tokens * _block_bytes_per_token(model)
    if checkpoint_activations:
        kept = model.blocks * tokens * 4 * model.hidden_size + 3 * block
    else:
        kept = (model.blocks + 1) * block
    working = kept + _logits_bytes(tokens, vocab_size, device) + _mask_bytes(rows, length)
    parameters = _parameter_bytes(model, vocab_size, _TRAIN_COPIES, dtype) - _spared_by_muon(inner, model, vocab_size)
    return parameters + working + _OVERHEAD_BYTES


def evaluate_bytes(
    model: ModelConfig,
    vocab_size: int,
    rows: int = _READ_ROWS,
    sequence_length: int | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> int:
    """Bytes that the losses of `rows` sequences at once need: no gradients, one block's activations at a time."""
    length = sequence_length or model.sequence_length
    tokens = rows * length
    block = tokens * _block_bytes_per_token(model)
    working = block + _logits_bytes(tokens, vocab_size, device) + _mask_bytes(rows, length)
    return _parameter_bytes(model, vocab_size, _READ_COPIES, dtype) + working + _OVERHEAD_BYTES


def featurize_bytes(
    model: ModelConfig, vocab_size: int, rows: int = 64, prefix_tokens: int = 32, dtype: Dtype = "auto"
) -> int:
    """Bytes that the prefix features of `rows` sequences at once need; no scores are computed."""
    tokens = rows * (prefix_tokens + 1)
    working = tokens * _block_bytes_per_token(model)
    return _parameter_bytes(model, vocab_size, _READ_COPIES, dtype) + working + _OVERHEAD_BYTES


def _parameter_bytes(model: ModelConfig, vocab_size: int, copies: int, dtype: Dtype) -> int:
    """The copies in float32, and one in bfloat16 that autocast may hold beside them."""
    parameters = sum(tensor.num_elements for tensor in _path_tensors(model, vocab_size))
    return parameters * (4 * copies + (0 if dtype == "float32" else 2))


def _path_tensors(model: ModelConfig, vocab_size: int) -> tuple[TensorSpec, ...]:
    whole_path = Level(0, 1, tuple(range(model.blocks)), embedding=True, head=True, per_path=False)
    return level_tensors(model, vocab_size, whole_path)


def _spared_by_muon(inner: InnerConfig, model: ModelConfig, vocab_size: int) -> int:
    """The v of the matrices that it takes, less what it works with on the largest of them."""
    tensors = _path_tensors(model, vocab_size)
    matrices = [tensor.num_elements for tensor in tensors if takes_muon(inner, tensor.name, len(tensor.shape))]
    return 4 * (sum(matrices) - _MUON_COPIES * max(matrices, default=0))


def _logits_bytes(tokens: int, vocab_size: int, device: Device) -> int:
    """Scores of the tokens taken at once, their log-softmax and its gradient."""
    return 3 * 4 * min(tokens * vocab_size, _LOGITS_ON_CPU if device == "cpu" else _LOGITS)


def _mask_bytes(rows: int, length: int) -> int:
    """Who sees whom, and one copy of it."""
    return 2 * 4 * rows * length * length


def _block_bytes_per_token(model: ModelConfig) -> int:
    """What one block keeps of one token for the backward pass, in float32; autocast keeps no more.

    Two norms (input, normed, scaled), queries, keys and values before and after rotation, the mixed values and their
    copy in token order, and gate, its SiLU, up and their product.
    """
    queries, keys = model.heads * model.size_per_head, model.num_kv_heads * model.size_per_head
    norms = 8 * model.hidden_size
    attention = 4 * queries + 4 * keys + (3 * (queries + keys) if model.qk_norm else 0) + model.heads
    return 4 * (norms + attention + 4 * model.intermediate_size)
