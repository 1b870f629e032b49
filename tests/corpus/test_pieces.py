from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corpus.pieces import pieces


@given(st.lists(st.text(alphabet="ab \n", max_size=40), max_size=20), st.integers(2, 30))
def test_pieces_are_the_text_and_none_is_too_long(chunks: list[str], limit: int) -> None:
    cut = list(pieces(chunks, limit))
    assert "".join(cut) == "".join(chunks)
    assert all(0 < len(piece) <= limit for piece in cut)


def test_the_strongest_boundary_wins() -> None:
    assert list(pieces(["aaaa bbbb\n\ncccc dddd"], 14)) == ["aaaa bbbb\n\n", "cccc dddd"]
    assert list(pieces(["aaaa bbbb cccc"], 10)) == ["aaaa bbbb ", "cccc"]


def test_how_the_text_arrives_does_not_matter() -> None:
    text = "\n\n".join(f"paragraph {number} " * 5 for number in range(40))
    assert list(pieces([text], 200)) == list(pieces([text[i : i + 7] for i in range(0, len(text), 7)], 200))
