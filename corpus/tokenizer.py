"""Text to token ids and back: trained byte-level BPE, plain bytes, or any tokenizer.json; at rest all are that.

Trained ones use the GPT-2 pre-tokenizer and byte alphabet (Radford et al. 2019) with BOS 0 and EOS 1, so that other
engines accept them. Special tokens spelled out in a text are plain text.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int64
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
SMALLEST_VOCABULARY = 258
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<|begin▁of▁sentence|>", "[CLS]")
_EOS_NAMES = (
    EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|end▁of▁sentence|>", "<|im_end|>", "[SEP]",
)  # fmt: skip


class BadTokenizer(ValueError):
    """A tokenizer that cannot be loaded or trained, or whose ids the model cannot take."""


class Tokenizer:
    """A tokenizer.json with its BOS and EOS. `vocab_size` counts up to the largest id."""

    def __init__(self, tokenizer: Any, source: str = "the tokenizer") -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise BadTokenizer(f"{source} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        bos = next((vocabulary[name] for name in _BOS_NAMES if name in vocabulary), None)
        eos = next((vocabulary[name] for name in _EOS_NAMES if name in vocabulary), None)
        if bos is None and eos is None:
            raise BadTokenizer(
                f"{source} has no token that starts or ends a text; looked for {_BOS_NAMES + _EOS_NAMES}"
            )
        self.bos_id: int = bos if bos is not None else eos  # type: ignore[assignment]
        self.eos_id: int = eos if eos is not None else bos  # type: ignore[assignment]

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the tokenizer") -> Tokenizer:
        """Load the bytes of a tokenizer.json; raises BadTokenizer."""
        try:
            return cls(tokenizers.Tokenizer.from_str(data.decode("utf-8")), source)
        except BadTokenizer:
            raise
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise BadTokenizer(f"{source} is not a tokenizer.json: {error}") from None

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Load a tokenizer.json; raises BadTokenizer."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadTokenizer(f"cannot read the tokenizer {path}: {error.strerror}") from None
        return cls.from_bytes(data, str(path))

    def to_bytes(self) -> bytes:
        """A tokenizer.json."""
        text: str = self._tokenizer.to_str(pretty=False)
        return text.encode("utf-8")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, without BOS and EOS."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    @cached_property
    def longest_token(self) -> int:
        """UTF-8 bytes of the longest token."""
        return int(self.token_byte_lengths().max())

    def token_byte_lengths(self) -> Int64[np.ndarray, " V"]:
        """UTF-8 bytes of text that each id stands for: what turns nats per token into bits per byte. Specials: 0."""
        description = json.loads(self.to_bytes())
        by_byte = "ByteLevel" in json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[token_id] = len(token) if by_byte else _spelled_bytes(token)
        for added in description.get("added_tokens", []):
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
        return lengths


def _spelled_bytes(token: str) -> int:
    """Bytes of a token spelled as SentencePiece (`▁` a space, `<0x0A>` a byte) or WordPiece (`##` in a word) does."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode("utf-8"))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with the 256 bytes, two special tokens and as many merges as `vocab_size` leaves room for.

    The same texts in the same order give the same bytes. A small sample may yield fewer merges than asked for.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise BadTokenizer(f"tokenizer.vocab_size is {vocab_size}; 256 bytes and two special tokens need 258")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def byte_tokenizer() -> Tokenizer:
    """Plain bytes: byte b has id b + 2."""
    vocabulary = {BOS: 0, EOS: 1} | {symbol: byte + 2 for byte, symbol in enumerate(byte_alphabet())}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
    tokenizer.add_special_tokens([BOS, EOS])
    return Tokenizer(tokenizer)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def _byte_level(model: Any, use_regex: bool) -> Any:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
