"""The first values of a module: a function of the seed and each tensor's name, the same on every machine.

Matrices are normal(0, init_std), those that write into the residual stream scaled by 1 / sqrt(2 * blocks) (GPT-2),
gains are one. All modules of a level start equal. One tensor is made at a time, in chunks. Torch-free.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs.schema import ModelConfig
from model.layout import ModuleSpec, TensorSpec
from model.tensor_file import Writer

_RESIDUAL = ("o_proj.weight", "down_proj.weight")
_CHUNK_ELEMENTS = 1 << 20


def init_std(tensor: TensorSpec, model: ModelConfig) -> float:
    """Standard deviation of a matrix's first values."""
    return model.init_std / math.sqrt(2 * model.blocks) if tensor.name.endswith(_RESIDUAL) else model.init_std


def initial_chunks(tensor: TensorSpec, model: ModelConfig, seed: int) -> Iterator[np.ndarray]:
    """The flat float32 values of a tensor, in chunks of at most 2**20."""
    generator = _generator(seed, tensor.name)
    for start in range(0, tensor.num_elements, _CHUNK_ELEMENTS):
        size = min(_CHUNK_ELEMENTS, tensor.num_elements - start)
        if len(tensor.shape) == 1:
            yield np.ones(size, np.float32)
        else:
            yield (generator.standard_normal(size) * init_std(tensor, model)).astype(np.float32)


def initial_tensor(tensor: TensorSpec, model: ModelConfig, seed: int) -> np.ndarray:
    """A whole tensor's first values."""
    return np.concatenate(list(initial_chunks(tensor, model, seed))).reshape(tensor.shape)


def write_initial_module(path: Path, spec: ModuleSpec, model: ModelConfig, seed: int) -> tuple[str, int]:
    """Write a module's first version; returns (SHA-256 hex, size in bytes) of the file."""
    with Writer(path, spec.tensors) as writer:
        for tensor in spec.tensors:
            for chunk in initial_chunks(tensor, model, seed):
                writer.append(chunk)
        return writer.finish()


def _generator(seed: int, name: str) -> np.random.Generator:
    """Values are drawn in float64 and rounded, so that a last bit of the platform's exp or log does not show."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
