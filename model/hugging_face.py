"""Hugging Face checkpoint directories: modules from a Llama or Qwen3 one, and a path as one that other engines load.

Reads config.json and safetensors (one file or sharded); refuses anything that would not compute the same function.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import ModelConfig
from model import tensor_file
from model.checkpoint_files import CONFIG, INDEX, WEIGHTS, CheckpointTokenizer, write_configuration, write_index
from model.layout import TensorSpec, module_spec
from model.topology import Topology

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class IncompatibleCheckpoint(ValueError):
    """A checkpoint directory that is not the model the configuration describes."""


def import_modules(
    directory: Path, model: ModelConfig, vocab_size: int, topology: Topology, out_dir: Path
) -> dict[str, Path]:
    """Write every module of `topology` from the checkpoint; returns module id -> tensor file in `out_dir`.

    All modules of a level are equal. Rows of the embedding beyond `vocab_size` are dropped. Tensors are read one at a
    time. Raises IncompatibleCheckpoint.
    """
    _check_config(directory, model, vocab_size)
    with _Checkpoint(directory) as checkpoint:
        files: dict[str, Path] = {}
        for module_id in topology.module_ids:
            files[module_id] = out_dir / module_id
            tensors = module_spec(model, vocab_size, topology, module_id).tensors
            with tensor_file.Writer(files[module_id], tensors) as writer:
                for tensor in tensors:
                    writer.append(checkpoint.read(tensor))
                writer.finish()
    return files


def export_path(
    directory: Path,
    model: ModelConfig,
    vocab_size: int,
    tensors: Mapping[str, np.ndarray],
    tokenizer: CheckpointTokenizer | None = None,
) -> str:
    """Write a path (`model.path.compose`) as a checkpoint directory: configuration, one file of weights, tokenizer.

    Returns the SHA-256 of the weights. The weights are in the one form of `model.tensor_file`, without metadata:
    transformers reads that from 4.48 on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_configuration(directory, checkpoint_config(model, vocab_size), model.sequence_length, tokenizer)
    return tensor_file.write(directory / WEIGHTS, tensors)[0]


def export_modules(
    directory: Path,
    model: ModelConfig,
    vocab_size: int,
    files: Mapping[str, Sequence[TensorSpec]],
    tokenizer: CheckpointTokenizer | None = None,
) -> None:
    """Write a checkpoint directory whose weights are files that are in it, by name, or will be: those of modules."""
    directory.mkdir(parents=True, exist_ok=True)
    write_configuration(directory, checkpoint_config(model, vocab_size), model.sequence_length, tokenizer)
    write_index(directory, files)


def model_of(directory: Path) -> tuple[ModelConfig, int]:
    """The shape and the vocabulary size of the path that a checkpoint directory holds; raises IncompatibleCheckpoint.

    Its sequences are as long as `max_position_embeddings`.
    """
    config = _read_json(directory / CONFIG)
    rope = config.get("rope_parameters") or {}
    try:
        model = ModelConfig(
            blocks=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads"),
            head_size=config.get("head_dim"),
            intermediate_size=config["intermediate_size"],
            sequence_length=config["max_position_embeddings"],
            qk_norm=config["model_type"] == "qwen3",
            tie_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
            norm_eps=config["rms_norm_eps"],
        )
        vocab_size = int(config["vocab_size"])
    except (KeyError, ValueError, TypeError) as error:
        raise IncompatibleCheckpoint(f"{directory / CONFIG} does not describe a path: {error}") from None
    _check_config(directory, model, vocab_size)
    return model, vocab_size


def checkpoint_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The config.json of a path: Llama's, or Qwen3's where QK-norm is on."""
    rope = {"rope_theta": model.rope_theta, "rope_type": "default"}
    return {
        "architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if model.qk_norm else "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.size_per_head,
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        "torch_dtype": "float32",
    }


class _Checkpoint:
    """The tensors of a checkpoint directory, opened as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = dict(_files_of_tensors(directory))
        self._open: dict[str, Any] = {}

    def __enter__(self) -> _Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def read(self, tensor: TensorSpec) -> np.ndarray:
        """Flat float32 values; the embedding may have more rows, and stands in for a head that was tied to it."""
        import torch
        from safetensors import safe_open

        name = _EMBEDDING if tensor.name == _HEAD and _HEAD not in self._files else tensor.name
        if name not in self._files:
            raise IncompatibleCheckpoint(f"{self._directory} has no tensor {name}")
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(self._directory / file, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        values = self._open[file].get_tensor(name)
        if name in (_HEAD, _EMBEDDING):
            values = values[: tensor.shape[0]]
        if tuple(values.shape) != tensor.shape:
            raise IncompatibleCheckpoint(
                f"{self._directory}: {name} has shape {tuple(values.shape)}, expected {tensor.shape}"
            )
        flat: np.ndarray = values.to(torch.float32).contiguous().view(-1).numpy()
        return flat


def _files_of_tensors(directory: Path) -> Iterator[tuple[str, str]]:
    """(tensor name, file name) of every tensor."""
    from safetensors import safe_open

    index = directory / INDEX
    if index.is_file():
        yield from _read_json(index)["weight_map"].items()
    elif (directory / WEIGHTS).is_file():
        with safe_open(directory / WEIGHTS, framework="np") as file:
            yield from ((name, WEIGHTS) for name in file.keys())  # noqa: SIM118
    else:
        raise IncompatibleCheckpoint(f"{directory} has neither model.safetensors nor model.safetensors.index.json")


def _check_config(directory: Path, model: ModelConfig, vocab_size: int) -> None:
    """Raise IncompatibleCheckpoint for the first thing that config.json and the configuration disagree on."""
    config = _read_json(directory / CONFIG)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise IncompatibleCheckpoint(f"{directory} scales its rotary positions ({rope}); only plain ones are supported")
    heads = config.get("num_attention_heads")
    found = config | {
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else None),
    }
    expected = checkpoint_config(model, vocab_size)
    keys = {
        "model_type": "qk_norm",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "blocks",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_size",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "rope_theta",
        "hidden_act": None,
    }
    for key, ours in keys.items():
        if found.get(key) != expected[key]:
            knob = f"; change model.{ours}" if ours else ""
            raise IncompatibleCheckpoint(f"{directory}: {key} is {found.get(key)}, expected {expected[key]}{knob}")
    if found.get("attention_bias") or found.get("mlp_bias") or found.get("use_sliding_window"):
        raise IncompatibleCheckpoint(f"{directory} uses biases or sliding-window attention, which a path does not have")
    if not found.get("tie_word_embeddings", False) and model.tie_embeddings:
        raise IncompatibleCheckpoint(f"{directory} has a head of its own; set model.tie_embeddings to false")
    if found.get("vocab_size", 0) < vocab_size:
        raise IncompatibleCheckpoint(
            f"{directory} knows {found.get('vocab_size')} tokens, the tokenizer {vocab_size}; use the checkpoint's own"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise IncompatibleCheckpoint(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise IncompatibleCheckpoint(f"{path} is not JSON: {error}") from None
    return content
