"""The files of a Hugging Face checkpoint directory that stand beside its weights: configuration, index, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.layout import TensorSpec

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """A tokenizer.json, and the tokens that start and end a text."""

    tokenizer_json: bytes
    bos_id: int
    eos_id: int


def write_configuration(
    directory: Path, config: Mapping[str, Any], sequence_length: int, tokenizer: CheckpointTokenizer | None
) -> None:
    """config.json, generation_config.json and, where there is a tokenizer, its files."""
    ends = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
    }
    write_json(directory / CONFIG, {**config, **ends})
    write_json(directory / "generation_config.json", ends)
    if tokenizer is not None:
        _write_tokenizer(directory, tokenizer, sequence_length)


def write_index(directory: Path, files: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Say which of several safetensors files, by name, holds which tensors."""
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    size = sum(4 * tensor.num_elements for tensors in files.values() for tensor in tensors)
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON object, indented for people."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(directory: Path, tokenizer: CheckpointTokenizer, sequence_length: int) -> None:
    """tokenizer.json and its two companions.

    Other than in training, where BOS is put before a text by the corpus, tokenizer.json does so itself: a text that is
    simply tokenized begins as the path has learnt it. Special tokens spelled out in a text are plain text, as there.
    """
    description = json.loads(tokenizer.tokenizer_json)
    names = {item["id"]: item["content"] for item in description.get("added_tokens", [])}
    names |= {token_id: token for token, token_id in _vocabulary(description).items() if token_id not in names}
    bos, eos = names[tokenizer.bos_id], names[tokenizer.eos_id]
    description["post_processor"] = _bos_first(bos, tokenizer.bos_id)
    (directory / TOKENIZER).write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": bos, "eos_token": eos}
    write_json(directory / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    write_json(directory / "tokenizer_config.json", settings)


def _vocabulary(description: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token; of a Unigram model, which lists its tokens, their places."""
    vocabulary = description["model"].get("vocab", {})
    if isinstance(vocabulary, list):
        return {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor of the tokenizers library that puts BOS before every text."""

    def special() -> dict[str, Any]:
        return {"SpecialToken": {"id": bos, "type_id": 0}}

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    return {
        "type": "TemplateProcessing",
        "single": [special(), text("A")],
        "pair": [special(), text("A"), text("B")],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
