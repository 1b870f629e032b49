from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import TokenizerConfig
from corpus.gguf_vocabulary import InexpressibleTokenizer, TokenKind, gguf_remark, gguf_vocabulary
from corpus.tokenizer import Tokenizer, byte_tokenizer, train_bpe

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BY_REGEX = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BY_REGEX, "use_regex": False}


def split(regex: str, **changes: Any) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}
    return {"type": "Sequence", "pretokenizers": [cut, BYTES_ONLY]}


def trained(**changes: Any) -> Tokenizer:
    """A trained tokenizer with parts of its tokenizer.json exchanged; `model` is merged into the model."""
    description = json.loads(train_bpe(["the theory of the thing, then the other"] * 3, 270).to_bytes())
    description["model"] |= changes.pop("model", {})
    return Tokenizer.from_bytes(json.dumps(description | changes).encode())


def test_a_trained_tokenizer_is_that_of_gpt_2_with_its_merges() -> None:
    tokenizer = trained()
    found = gguf_vocabulary(tokenizer)
    assert found.pre_tokenizer == "gpt-2"
    assert len(found.tokens) == len(found.kinds) == tokenizer.vocab_size
    assert found.tokens[tokenizer.bos_id] == "<|bos|>"
    assert [kind for kind in found.kinds if kind is not TokenKind.NORMAL] == [TokenKind.CONTROL] * 2
    assert found.merges[0] == "t h"
    assert len(found.merges) == 270 - 258
    assert (found.bos_id, found.eos_id) == (0, 1)


def test_bytes_are_expressed_by_a_merge_that_no_text_has() -> None:
    found = gguf_vocabulary(byte_tokenizer())
    assert found.merges == ("<|bos|> <|bos|>",)
    assert len(found.tokens) == 258


def test_ids_that_are_no_token_and_tokens_added_by_hand_keep_their_places() -> None:
    description = json.loads(trained().to_bytes())
    word = {**description["added_tokens"][0], "id": 270, "content": "a word", "special": False}
    description["added_tokens"].append(word)
    description["model"]["vocab"]["the"] = 280
    found = gguf_vocabulary(Tokenizer.from_bytes(json.dumps(description).encode()))
    (word_id,) = (token_id for token_id, token in enumerate(found.tokens) if token == "a word")
    assert found.kinds[word_id] is TokenKind.USER_DEFINED
    assert (found.tokens[280], found.kinds[280]) == ("the", TokenKind.NORMAL)
    assert found.kinds.count(TokenKind.UNUSED) >= 9
    assert len(set(found.tokens)) == len(found.tokens)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pre_tokenizer": split(LLAMA_3), "model": {"ignore_merges": True}}, "llama-bpe"),
        ({"pre_tokenizer": split(LLAMA_3.replace("{1,3}", ""))}, "qwen2"),
        ({"pre_tokenizer": split(LLAMA_3.replace("{1,3}", "")), "normalizer": {"type": "NFC"}}, "qwen2"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True}, BY_REGEX]}},
            "smollm",
        ),
    ],
)  # fmt: skip
def test_the_pre_tokenizers_of_known_families_have_names(changes: dict[str, Any], name: str) -> None:
    assert gguf_vocabulary(trained(**changes)).pre_tokenizer == name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pre_tokenizer": BYTES_ONLY}, "its pre-tokenizer (ByteLevel) cuts text in a way that llama.cpp has no name"),
        ({"pre_tokenizer": {**BY_REGEX, "add_prefix_space": True}}, "its pre-tokenizer (ByteLevel)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer (Whitespace)"),
        ({"pre_tokenizer": None}, "its pre-tokenizer (missing)"),
        ({"pre_tokenizer": split(LLAMA_3 + "|x")}, "its pre-tokenizer (Split and ByteLevel)"),
        ({"pre_tokenizer": split(LLAMA_3, behavior="Removed")}, "its pre-tokenizer (Split and ByteLevel)"),
        ({"pre_tokenizer": split(LLAMA_3)}, "its ignore_merges is not that of 'llama-bpe'"),
        ({"model": {"ignore_merges": True}}, "its ignore_merges is not that of 'gpt-2'"),
        ({"model": {"byte_fallback": True}}, "it is BPE with byte fallback, expected byte-level BPE"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "its end_of_word_suffix is '</w>', expected none"),
        ({"normalizer": {"type": "Lowercase"}}, "changed by a normalizer (Lowercase), expected none or NFC"),
    ],
)
def test_what_gguf_has_no_form_for_is_refused_in_a_sentence(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InexpressibleTokenizer) as refused:
        gguf_vocabulary(trained(**changes))
    assert why in str(refused.value)
    assert str(refused.value).startswith("GGUF cannot express the tokenizer of this run: ")
    assert "export its paths by --format hf" in str(refused.value)


def test_a_token_outside_the_alphabet_of_bytes_is_refused() -> None:
    description = json.loads(trained().to_bytes())
    description["model"]["vocab"]["日本"] = 270
    with pytest.raises(InexpressibleTokenizer, match="its token '日本' is not spelled in the alphabet of bytes"):
        gguf_vocabulary(Tokenizer.from_bytes(json.dumps(description).encode()))


def test_who_configures_a_run_is_told(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    configured = TokenizerConfig(kind="file", path=str(file))
    assert gguf_remark(configured) is None
    file.write_bytes(trained().to_bytes())
    assert gguf_remark(configured) is None
    assert gguf_remark(TokenizerConfig()) is None
    file.write_bytes(trained(normalizer={"type": "Lowercase"}).to_bytes())
    remark = gguf_remark(configured)
    assert remark is not None
    assert remark.startswith("remark: GGUF cannot express")
