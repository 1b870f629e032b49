"""Text as it streams: the same as the text decoded whole, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.tokenizer import byte_tokenizer
from inference.text_stream import TextStream

DECODE = byte_tokenizer().decode
TEXTS = st.text(st.sampled_from("abé漢🙂\ufffd\n "), max_size=60)


def streamed(data: bytes, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(DECODE, stop)
    pieces = []
    for byte in data:
        pieces.append(stream.add(byte + 2))
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream


@given(TEXTS)
def test_pieces_are_the_text(text: str) -> None:
    pieces, _ = streamed(text.encode())
    assert "".join(pieces) == text


@given(st.binary(max_size=120))
def test_bytes_that_are_no_text_come_as_they_are_decoded_whole(data: bytes) -> None:
    pieces, _ = streamed(data)
    assert "".join(pieces) == DECODE([byte + 2 for byte in data])


@given(TEXTS, st.lists(st.text("abé漢\n ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_before_it(text: str, stops: list[str]) -> None:
    pieces, stream = streamed(text.encode(), *stops)
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    assert stream.stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    first = min(ends.values())  # the stop string that is complete first
    shown = min(end - len(stop) for stop, end in ends.items() if end == first)
    assert "".join(pieces) == text[:shown]


def test_text_is_shown_as_soon_as_it_cannot_become_a_stop_string() -> None:
    stream = TextStream(DECODE, ["END"])
    assert [stream.add(byte + 2) for byte in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert stream.end() == "EN"


@pytest.mark.parametrize("repeats", [1, 40])
def test_half_a_character_waits_for_its_other_half(repeats: int) -> None:
    stream = TextStream(DECODE)
    for _ in range(repeats):
        assert [stream.add(byte + 2) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
