"""A tokenizer as GGUF has it: byte-level BPE by tokens, merges and the name of one of llama.cpp's pre-tokenizers.

GGUF names how text is cut into words and does not describe it, so that only tokenizers cut like one of those that
llama.cpp knows can be expressed; all others are refused. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from configs.corpus import TokenizerConfig
from corpus.tokenizer import BadTokenizer, Tokenizer, byte_alphabet

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CASELESS + r"\p{N}{1,3}" + _AFTER_NUMBERS: "llama-bpe",
    _CASELESS + r"\p{N}" + _AFTER_NUMBERS: "qwen2",
}
_TAKES_WHOLE_WORDS = {"llama-bpe"}
"""Where a word that is a token is taken as it is, whatever the merges would make of it (`ignore_merges`)."""
_WHOLE_TEXT = "gpt-2"
"""Of a tokenizer without merges: wherever text is cut, it comes to the same bytes."""


class InexpressibleTokenizer(ValueError):
    """A tokenizer that GGUF has no form for; the message says what of it, and what to do."""


class TokenKind(IntEnum):
    """What a token of GGUF is (`tokenizer.ggml.token_type`)."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """`tokens` by id, with a placeholder for every id that is none; `merges` as pairs with a space between them.

    `pre_tokenizer` is llama.cpp's name of it.
    """

    pre_tokenizer: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    merges: tuple[str, ...]
    bos_id: int
    eos_id: int


def gguf_vocabulary(tokenizer: Tokenizer) -> GgufVocabulary:
    """The tokenizer for GGUF; raises InexpressibleTokenizer."""
    description = json.loads(tokenizer.to_bytes())
    model = description["model"]
    _refuse_other_models(description)
    merges = tuple(each if isinstance(each, str) else " ".join(each) for each in model["merges"])
    tokens = [f"[unused {token}]" for token in range(tokenizer.vocab_size)]
    kinds = [TokenKind.UNUSED] * tokenizer.vocab_size
    for token, token_id in model["vocab"].items():
        tokens[token_id], kinds[token_id] = token, TokenKind.NORMAL
    for added in description.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenKind.CONTROL if added["special"] else TokenKind.USER_DEFINED
    _refuse_other_alphabets(tokens, kinds)
    bos = tokens[tokenizer.bos_id]
    return GgufVocabulary(
        pre_tokenizer=_pre_tokenizer(description),
        tokens=tuple(tokens),
        kinds=tuple(kinds),
        # GGUF has no empty arrays: a pair that no text has, as its halves are not made by any merge.
        merges=merges or (f"{bos} {bos}",),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def gguf_remark(config: TokenizerConfig) -> str | None:
    """What to tell who configures a run by this tokenizer; None where its paths can become GGUF files.

    None, too, where its file cannot be read: that is for who needs it, and a run that has its tokenizer does not.
    """
    if config.kind != "file":
        return None
    assert config.path is not None, "the schema asks for a path"
    try:
        gguf_vocabulary(Tokenizer.from_file(config.path))
    except InexpressibleTokenizer as error:
        return f"remark: {error}"
    except BadTokenizer:
        return None
    return None


def _refuse_other_models(description: Mapping[str, Any]) -> None:
    model, normalizer = description["model"], description.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback" if model["type"] == "BPE" else model["type"]
        raise _inexpressible(f"it is {kind}, expected byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _inexpressible(f"its {key} is {model[key]!r}, expected none")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _inexpressible(f"its text is changed by a normalizer ({normalizer['type']}), expected none or NFC")


def _refuse_other_alphabets(tokens: list[str], kinds: list[TokenKind]) -> None:
    alphabet = set(byte_alphabet())
    for token, kind in zip(tokens, kinds, strict=True):
        if kind is TokenKind.NORMAL and not alphabet.issuperset(token):
            raise _inexpressible(f"its token {token!r} is not spelled in the alphabet of bytes")


def _pre_tokenizer(description: Mapping[str, Any]) -> str:
    """llama.cpp's name; raises InexpressibleTokenizer where it has none that cuts text alike."""
    parts = _parts(description.get("pre_tokenizer"))
    kinds = [part["type"] for part in parts]
    last = parts[-1] if parts else {}
    name = None
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        if not description["model"]["merges"]:
            return _WHOLE_TEXT
        by_regex = last.get("use_regex", True)
        if by_regex and kinds == ["ByteLevel"]:
            name = "gpt-2"
        elif by_regex and kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
            name = "smollm"
        elif not by_regex and kinds == ["Split", "ByteLevel"] and _cuts_into_words(parts[0]):
            name = _SPLITS.get(parts[0]["pattern"].get("Regex", ""))
    if name is None:
        shown = " and ".join(kinds) or "missing"
        raise _inexpressible(f"its pre-tokenizer ({shown}) cuts text in a way that llama.cpp has no name for")
    if bool(description["model"].get("ignore_merges")) != (name in _TAKES_WHOLE_WORDS):
        raise _inexpressible(f"its ignore_merges is not that of {name!r}, whose pre-tokenizer it has")
    return name


def _parts(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _cuts_into_words(split: Mapping[str, Any]) -> bool:
    return split["behavior"] == "Isolated" and not split["invert"]


def _inexpressible(why: str) -> InexpressibleTokenizer:
    return InexpressibleTokenizer(
        f"GGUF cannot express the tokenizer of this run: {why}; export its paths by --format hf, or train a "
        "tokenizer (tokenizer.kind: bpe)"
    )
