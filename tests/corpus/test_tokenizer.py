from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models

from corpus.tokenizer import BadTokenizer, Tokenizer, byte_tokenizer, train_bpe

TEXTS = [
    "the cat sat on the mat, then the dog sat on the log\n" * 20,
    "def add(left, right):\n    return left + right\n" * 20,
]
BPE = train_bpe(TEXTS, 280)
BYTES = byte_tokenizer()


@given(st.text())
def test_every_text_survives_and_its_bytes_are_counted(text: str) -> None:
    for tokenizer in (BPE, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_byte_lengths()[ids].sum() == len(text.encode("utf-8"))


def test_ids_are_fixed() -> None:
    assert (BPE.bos_id, BPE.eos_id, BYTES.bos_id, BYTES.eos_id) == (0, 1, 0, 1)
    assert BPE.vocab_size == 280
    assert BYTES.vocab_size == 258
    assert BYTES.encode("aé\x00") == [byte + 2 for byte in "aé\x00".encode()]


def test_a_batch_is_its_texts() -> None:
    assert BPE.encode_batch(["the cat", "", "sat"]) == [BPE.encode(text) for text in ("the cat", "", "sat")]
    assert BPE.encode_batch([]) == []


def test_spelled_out_special_tokens_are_plain_text() -> None:
    for tokenizer in (BPE, BYTES, Tokenizer.from_bytes(BPE.to_bytes())):
        ids = tokenizer.encode("a<|eos|>b")
        assert not {0, 1} & set(ids)
        assert tokenizer.decode([0, *ids, 1]) == "a<|eos|>b"


def test_bytes_at_rest_load_to_the_same_tokenizer(tmp_path: Path) -> None:
    for tokenizer in (BPE, BYTES):
        (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_bytes())
        loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
        assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
        assert loaded.to_bytes() == tokenizer.to_bytes()


@pytest.mark.parametrize("environment", [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1"}])
def test_training_gives_the_same_bytes_in_every_process(environment: dict[str, str]) -> None:
    script = "import sys; from corpus.tokenizer import train_bpe; from pathlib import Path\n"
    script += "texts = [p.read_text() for p in sorted(Path('corpus').glob('*.py'))]\n"
    script += "sys.stdout.buffer.write(train_bpe(texts, 600).to_bytes())"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=os.environ | environment, capture_output=True, check=True
    )
    texts = [path.read_text() for path in sorted((root / "corpus").glob("*.py"))]
    assert done.stdout == train_bpe(texts, 600).to_bytes()


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(BadTokenizer, match="258"):
        train_bpe(TEXTS, 257)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BadTokenizer, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer.from_file(path)
    path.write_text("{}")
    with pytest.raises(BadTokenizer, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.from_file(path)
    without_ends = LibraryTokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str()
    path.write_text(without_ends)
    with pytest.raises(BadTokenizer, match="no token that starts or ends a text"):
        Tokenizer.from_file(path)


def test_one_usual_end_token_serves_as_both() -> None:
    library = LibraryTokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 7}, unk_token="a"))
    tokenizer = Tokenizer.from_bytes(library.to_str().encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (7, 7, 8)


def test_sentencepiece_spelling_is_counted_in_bytes() -> None:
    library = LibraryTokenizer(models.WordLevel({"<s>": 0, "▁the": 1, "<0x0A>": 2, "é": 3}, unk_token="é"))
    library.add_special_tokens(["<s>"])
    assert Tokenizer.from_bytes(library.to_str().encode()).token_byte_lengths().tolist() == [0, 4, 1, 2]
