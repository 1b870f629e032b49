from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import LevelConfig, ModelConfig
from model.gguf import MissingExtra, gguf_name, interleaved, write_gguf
from model.path import compose
from model.topology import Topology
from tests.model.conftest import TWO_BY_TWO, VOCAB_SIZE, tiny_model, topology

WriteModules = Callable[[ModelConfig, Topology], dict[str, Path]]
ONE_MODULE = [LevelConfig(modules=1, blocks=[0, 1, 2, 3], embedding=True, head=True)]


@dataclass(frozen=True)
class Letters:
    """A vocabulary of so many tokens."""

    pre_tokenizer: str = "gpt-2"
    tokens: tuple[str, ...] = tuple(f"t{token}" for token in range(VOCAB_SIZE))
    kinds: tuple[int, ...] = (3, 3, *[1] * (VOCAB_SIZE - 2))
    merges: tuple[str, ...] = ("t 1",)
    bos_id: int = 0
    eos_id: int = 1


def written(tmp_path: Path, write_modules: WriteModules, **shape: Any) -> tuple[Any, dict[str, np.ndarray], str]:
    """A path as a GGUF file that was read again, its tensors, and the prefix of its keys."""
    gguf = pytest.importorskip("gguf")
    model, grid = tiny_model(**shape), topology(TWO_BY_TWO)
    files = write_modules(model, grid)
    tensors = compose(model, VOCAB_SIZE, grid, {module: files[module] for module in grid.modules_of_path(1)})
    write_gguf(tmp_path / "path.gguf", model, tensors, Letters(), "a name")
    return gguf.GGUFReader(tmp_path / "path.gguf"), tensors, "qwen3" if model.qk_norm else "llama"


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2}, {"qk_norm": True, "head_size": 16}, {"tie_embeddings": False}])
def test_every_tensor_is_there_as_it_is_but_for_the_order_of_rotary_pairs(
    tmp_path: Path, write_modules: WriteModules, shape: dict[str, Any]
) -> None:
    reader, tensors, architecture = written(tmp_path, write_modules, **shape)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert found.keys() == {gguf_name(name) for name in tensors}
    model = tiny_model(**shape)
    for name, values in tensors.items():
        expected = values
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            expected = interleaved(values, model.heads if "q_proj" in name else model.num_kv_heads)
            assert not np.array_equal(expected, values)
        np.testing.assert_array_equal(found[gguf_name(name)], expected, err_msg=name)


def test_the_shape_and_the_vocabulary_are_in_the_header(tmp_path: Path, write_modules: WriteModules) -> None:
    reader, _, prefix = written(tmp_path, write_modules, kv_heads=2, rope_theta=500.0)
    expected = {
        "general.architecture": "llama",
        "general.name": "a name",
        f"{prefix}.block_count": 4,
        f"{prefix}.context_length": 64,
        f"{prefix}.embedding_length": 32,
        f"{prefix}.feed_forward_length": 48,
        f"{prefix}.attention.head_count": 4,
        f"{prefix}.attention.head_count_kv": 2,
        f"{prefix}.attention.key_length": 8,
        f"{prefix}.attention.value_length": 8,
        f"{prefix}.rope.dimension_count": 8,
        f"{prefix}.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(Letters().tokens),
        "tokenizer.ggml.token_type": list(Letters().kinds),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: reader.fields[key].contents() for key in expected} == expected
    assert reader.fields[f"{prefix}.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(1e-6)


def test_interleaved_rows_put_the_halves_of_every_head_side_by_side() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None]  # two heads of six rows: pairs (0, 3), (1, 4), (2, 5)
    assert interleaved(rows, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_names_are_those_of_llama_cpp() -> None:
    assert gguf_name("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    assert gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_name("lm_head.weight") == "output.weight"


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"needs the package gguf: pip install 'dipaco\[export\]'"):
        write_gguf(tmp_path / "x.gguf", tiny_model(), {}, Letters(), "x")
    assert not (tmp_path / "x.gguf").exists()
