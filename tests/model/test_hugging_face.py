from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from configs.schema import LevelConfig, ModelConfig
from corpus.tokenizer import byte_tokenizer
from model.checkpoint_files import CheckpointTokenizer
from model.hugging_face import IncompatibleCheckpoint, export_path, import_modules, model_of
from model.path import compose, load_path
from model.topology import Topology
from tests.model.conftest import TWO_BY_TWO, VOCAB_SIZE, tiny_model, topology

WriteModules = Callable[[ModelConfig, Topology], dict[str, Path]]

ONE_MODULE = [LevelConfig(modules=1, blocks=[0, 1, 2, 3], embedding=True, head=True)]
FLAT_EXPERTS = [LevelConfig(modules=3, blocks=[0, 1, 2, 3], embedding=True, head=True)]
PATH_SPECIFIC = [
    LevelConfig(modules="path", blocks=[0], embedding=True),
    LevelConfig(modules=2, blocks=[1, 3]),
    LevelConfig(modules=2, blocks=[2], head=True),
]
LLAMA: dict[str, Any] = {"kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-5}
QWEN: dict[str, Any] = {"qk_norm": True, "head_size": 16, "kv_heads": 1}


def export(directory: Path, model: ModelConfig, grid: Topology, files: dict[str, Path], path_index: int) -> None:
    chosen = {module_id: files[module_id] for module_id in grid.modules_of_path(path_index)}
    export_path(directory, model, VOCAB_SIZE, compose(model, VOCAB_SIZE, grid, chosen))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.extra
@pytest.mark.parametrize("levels", [ONE_MODULE, TWO_BY_TWO, FLAT_EXPERTS, PATH_SPECIFIC])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [{}, LLAMA, QWEN])
def test_logits_are_those_of_transformers(
    tmp_path: Path, write_modules: WriteModules, levels: list[LevelConfig], tied: bool, shape: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    model, grid = tiny_model(tie_embeddings=tied, **shape), topology(levels)
    files = write_modules(model, grid)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))
    for path_index in {0, grid.num_paths - 1}:
        export(tmp_path / "exported", model, grid, files, path_index)
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
        assert type(reference).__name__ == ("Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM")
        path = load_path(
            model, VOCAB_SIZE, grid, {module_id: files[module_id] for module_id in grid.modules_of_path(path_index)}
        )
        with torch.no_grad():
            expected, found = reference(tokens).logits, path.logits(path(tokens))
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.extra
def test_a_checkpoint_that_transformers_wrote_is_imported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, grid = tiny_model(qk_norm=True, kv_heads=2, tie_embeddings=False), topology(TWO_BY_TWO)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB_SIZE + 16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
    )
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(config).bfloat16()
    reference.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    assert (tmp_path / "checkpoint" / "model.safetensors.index.json").exists()
    (tmp_path / "out").mkdir()
    files = import_modules(tmp_path / "checkpoint", model, VOCAB_SIZE, grid.dense(), tmp_path / "out")
    path = load_path(model, VOCAB_SIZE, grid.dense(), files)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = reference.float()(tokens).logits[..., :VOCAB_SIZE]
        torch.testing.assert_close(path.logits(path(tokens)), expected, atol=1e-4, rtol=0)


@pytest.mark.extra
def test_the_tokenizer_goes_along(tmp_path: Path, write_modules: WriteModules) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    model, grid = tiny_model(), topology(ONE_MODULE)
    tensors = compose(model, VOCAB_SIZE, grid, write_modules(model, grid))
    files = CheckpointTokenizer(tokenizer.to_bytes(), tokenizer.bos_id, tokenizer.eos_id)
    export_path(tmp_path / "x", model, VOCAB_SIZE, tensors, files)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    text = "Grüße, 世界!\n  x = <|eos|> 1"
    assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert loaded(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("tied", [True, False])
def test_export_and_import_are_inverse(tmp_path: Path, write_modules: WriteModules, tied: bool) -> None:
    model, grid = tiny_model(tie_embeddings=tied, qk_norm=True), topology(TWO_BY_TWO)
    files = write_modules(model, grid)
    export(tmp_path / "x", model, grid, files, 3)
    (tmp_path / "out").mkdir()
    again = import_modules(tmp_path / "x", model, VOCAB_SIZE, grid.dense(), tmp_path / "out")
    assert again.keys() == {"0.0", "1.0"}
    assert again["0.0"].read_bytes() == files["0.1"].read_bytes()
    assert again["1.0"].read_bytes() == files["1.1"].read_bytes()


@pytest.mark.parametrize("shape", [{}, LLAMA, QWEN, {"tie_embeddings": False}])
def test_the_shape_of_a_path_is_read_from_what_was_exported(
    tmp_path: Path, write_modules: WriteModules, shape: dict[str, Any]
) -> None:
    model, grid = tiny_model(**shape), topology(ONE_MODULE)
    export(tmp_path / "x", model, grid, write_modules(model, grid), 0)
    found, vocab_size = model_of(tmp_path / "x")
    filled = {"kv_heads": model.num_kv_heads, "head_size": model.size_per_head, "init_std": found.init_std}
    assert (found, vocab_size) == (model.model_copy(update=filled), VOCAB_SIZE)


def test_what_is_no_path_is_not_read_as_one(tmp_path: Path, write_modules: WriteModules) -> None:
    model, grid = tiny_model(), topology(ONE_MODULE)
    export(tmp_path / "x", model, grid, write_modules(model, grid), 0)
    edit(tmp_path / "x" / "config.json", model_type="gpt_oss")
    with pytest.raises(IncompatibleCheckpoint, match="model_type is gpt_oss, expected llama"):
        model_of(tmp_path / "x")
    edit(tmp_path / "x" / "config.json", model_type="llama", hidden_size=None)
    with pytest.raises(IncompatibleCheckpoint, match="does not describe a path"):
        model_of(tmp_path / "x")


def test_a_tied_head_may_become_one_of_its_own(tmp_path: Path, write_modules: WriteModules) -> None:
    model, grid = tiny_model(), topology(ONE_MODULE)
    export(tmp_path / "x", model, grid, write_modules(model, grid), 0)
    (tmp_path / "out").mkdir()
    untied = tiny_model(tie_embeddings=False)
    files = import_modules(tmp_path / "x", untied, VOCAB_SIZE, grid, tmp_path / "out")
    tensors = load_file(files["0.0"])
    assert np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size is 64, expected 32; change model\.hidden_size"),
        ({"model_type": "qwen3"}, "model_type is qwen3, expected llama"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, expected 4"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, r"rope_theta is 5\.0"),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn"}}, "scales its rotary"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "scales its rotary"),
        ({"attention_bias": True}, "biases"),
        ({"tie_word_embeddings": False}, "head of its own"),
        ({"vocab_size": 10}, "knows 10 tokens, the tokenizer 48"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    ],
)
def test_another_function_is_refused(
    tmp_path: Path, write_modules: WriteModules, changes: dict[str, Any], message: str
) -> None:
    model, grid = tiny_model(), topology(ONE_MODULE)
    export(tmp_path / "x", model, grid, write_modules(model, grid), 0)
    edit(tmp_path / "x" / "config.json", **changes)
    with pytest.raises(IncompatibleCheckpoint, match=message):
        import_modules(tmp_path / "x", model, VOCAB_SIZE, grid, tmp_path)


def test_an_older_config_is_read(tmp_path: Path, write_modules: WriteModules) -> None:
    model, grid = tiny_model(rope_theta=500.0), topology(ONE_MODULE)
    export(tmp_path / "x", model, grid, write_modules(model, grid), 0)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    (tmp_path / "out").mkdir()
    assert import_modules(tmp_path / "x", model, VOCAB_SIZE, grid, tmp_path / "out").keys() == {"0.0"}


def test_missing_parts_are_named(tmp_path: Path, write_modules: WriteModules) -> None:
    model, grid = tiny_model(), topology(ONE_MODULE)
    with pytest.raises(IncompatibleCheckpoint, match=r"cannot read .*config\.json"):
        import_modules(tmp_path / "nothing", model, VOCAB_SIZE, grid, tmp_path)
    export(tmp_path / "x", model, grid, write_modules(model, grid), 0)
    weights = tmp_path / "x" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.2" not in name}, weights)
    with pytest.raises(IncompatibleCheckpoint, match=r"has no tensor model\.layers\.2"):
        import_modules(tmp_path / "x", model, VOCAB_SIZE, grid, tmp_path)
    weights.unlink()
    with pytest.raises(IncompatibleCheckpoint, match=r"neither model\.safetensors nor"):
        import_modules(tmp_path / "x", model, VOCAB_SIZE, grid, tmp_path)
