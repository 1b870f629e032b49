"""Exported paths in transformers and in llama.cpp: the same greedy text as here, up to the first near-tie.

llama.cpp is built from source (extra `llama`, `make test-llama`); without it, or without gguf, its half is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import LevelConfig, ModelConfig, TopologyConfig
from corpus.gguf_vocabulary import gguf_vocabulary
from corpus.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from model.checkpoint_files import CheckpointTokenizer
from model.gguf import write_gguf
from model.hugging_face import export_path
from model.initial import write_initial_module
from model.layout import module_spec
from model.path import compose, load_path
from model.topology import Topology
from model.transformer import PathModel

pytestmark = [pytest.mark.extra, pytest.mark.slow]

NEAR_TIE = 1e-3
TOKENS = 200
TEXTS = [
    "Grüße, 世界!\n  x = 1\t\t# it's  they'll 12345 ...  \n\n",
    "def main(self, value):\n    return [index for index in range(10)]\n",
    "The party of the first part shall indemnify any licensee — notwithstanding clause 3.14.",
]
TWO_BY_TWO = [LevelConfig(modules=2, blocks=[0, 1], embedding=True), LevelConfig(modules=2, blocks=[2, 3], head=True)]
LLAMA: dict[str, Any] = {"rope_theta": 500.0, "kv_heads": 2}
QWEN: dict[str, Any] = {"qk_norm": True, "head_size": 16, "kv_heads": 2, "tie_embeddings": False}
Logits = Callable[[list[int]], np.ndarray]


class Exported:
    """The paths of a tiny mixture of random weights, and their exports."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, **shape: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        sizes: dict[str, Any] = {"blocks": 4, "hidden_size": 64, "heads": 4, "intermediate_size": 96}
        self.model = ModelConfig(**sizes, sequence_length=256, init_std=0.3, **shape)
        self.grid = Topology.from_config(TopologyConfig(levels=TWO_BY_TWO))
        self.files: dict[str, Path] = {}
        for seed, module_id in enumerate(self.grid.module_ids):
            self.files[module_id] = folder / module_id
            spec = module_spec(self.model, tokenizer.vocab_size, self.grid, module_id)
            write_initial_module(self.files[module_id], spec, self.model, seed)

    def _chosen(self, path_index: int) -> dict[str, Path]:
        return {module_id: self.files[module_id] for module_id in self.grid.modules_of_path(path_index)}

    def path(self, path_index: int) -> PathModel:
        chosen = self._chosen(path_index)
        return load_path(self.model, self.tokenizer.vocab_size, self.grid, chosen).eval().requires_grad_(False)

    def checkpoint(self, path_index: int) -> Path:
        out, tokenizer = self.folder / f"hf-{path_index}", self.tokenizer
        tensors = compose(self.model, tokenizer.vocab_size, self.grid, self._chosen(path_index))
        files = CheckpointTokenizer(tokenizer.to_bytes(), tokenizer.bos_id, tokenizer.eos_id)
        export_path(out, self.model, tokenizer.vocab_size, tensors, files)
        return out

    def gguf(self, path_index: int) -> Path:
        out = self.folder / f"{path_index}.gguf"
        tensors = compose(self.model, self.tokenizer.vocab_size, self.grid, self._chosen(path_index))
        write_gguf(out, self.model, tensors, gguf_vocabulary(self.tokenizer), f"path {path_index}")
        return out


def ours(path: PathModel) -> Logits:
    def logits(tokens: list[int]) -> np.ndarray:
        scores: np.ndarray = path.logits(path(torch.tensor([tokens]))[0]).numpy()
        return scores

    return logits


def greedy(logits: Logits, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest tokens after a prompt, and by how much each was above the second."""
    tokens, margins = list(prompt), []
    for _ in range(TOKENS):
        scores = logits(tokens)[-1]
        second, first = np.sort(scores)[-2:]
        margins.append(float(first - second))
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :], margins


def agree(expected: tuple[list[int], list[float]], found: list[int]) -> int:
    """How many tokens are equal; fails where they part before the first near-tie."""
    tokens, margins = expected
    assert len(found) == len(tokens)
    equal = next((place for place in range(len(tokens)) if tokens[place] != found[place]), len(tokens))
    near_tie = next((place for place, margin in enumerate(margins) if margin < NEAR_TIE), len(tokens))
    assert equal >= near_tie, f"they part at token {equal}, where the margin is {margins[equal]}"
    return equal


@pytest.fixture(params=["llama-bpe", "qwen-bpe", "llama-bytes"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Exported:
    kind, _, tokenizer = request.param.partition("-")
    made = byte_tokenizer() if tokenizer == "bytes" else train_bpe(TEXTS * 20, 400)
    return Exported(tmp_path, made, **(LLAMA if kind == "llama" else QWEN))


def test_transformers_writes_the_text_of_three_paths(exported: Exported) -> None:
    transformers = pytest.importorskip("transformers")
    equal = []
    for path_index, text in zip((0, 1, 3), TEXTS, strict=True):
        folder = exported.checkpoint(path_index)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompt = [exported.tokenizer.bos_id, *exported.tokenizer.encode(text[:20])]
        assert tokenizer(text[:20])["input_ids"] == prompt
        logits = ours(exported.path(path_index))
        with torch.no_grad():
            theirs = model(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(logits(prompt), theirs, atol=1e-4, rtol=0)
        settings = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
        equal.append(agree(greedy(logits, prompt), written[len(prompt) :]))
    assert sum(equal) > TOKENS, equal


@pytest.fixture
def open_llama() -> Iterator[Callable[[Path], Any]]:
    """Opens GGUF files in llama.cpp, with keys and values in float32 (its cache rounds them to half by default)."""
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    opened: list[Any] = []

    def load(file: Path) -> Any:
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
        opened.append(llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **exact))
        return opened[-1]

    yield load
    for each in opened:
        each.close()


def test_llama_cpp_writes_the_text_of_three_paths(exported: Exported, open_llama: Callable[[Path], Any]) -> None:
    equal = []
    for path_index, text in zip((0, 1, 3), TEXTS, strict=True):
        llama = open_llama(exported.gguf(path_index))
        prompt = [exported.tokenizer.bos_id, *exported.tokenizer.encode(text[:20])]
        llama.reset()
        llama.eval(prompt)
        logits = ours(exported.path(path_index))
        np.testing.assert_allclose(np.array(llama.scores[: len(prompt)]), logits(prompt), atol=1e-4, rtol=0)
        written = []
        for _ in range(TOKENS):
            written.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(written[-1:])
        equal.append(agree(greedy(logits, prompt), written))
    assert sum(equal) > TOKENS, equal


def test_llama_cpp_cuts_text_into_the_same_tokens(exported: Exported, open_llama: Callable[[Path], Any]) -> None:
    llama = open_llama(exported.gguf(0))
    tokenizer = exported.tokenizer
    assert (llama.token_bos(), llama.token_eos()) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in TEXTS:
        found = llama.tokenize(text.encode(), add_bos=True, special=False)
        assert found == [tokenizer.bos_id, *tokenizer.encode(text)], text
        assert llama.detokenize(found[1:]).decode() == text
