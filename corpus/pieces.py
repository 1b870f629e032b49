"""Cutting a long text into documents at natural boundaries: a line that starts a section, an empty line, a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

DOCUMENT_CHARACTERS = 20_000
_BOUNDARIES = ("\n\n\n", "\n\n", "\n", " ")


def cut_point(text: str, limit: int) -> int:
    """Where to cut `text`, longer than `limit`, so that the first piece has at most `limit` characters.

    The last strongest boundary of the second half wins; without any boundary there the cut falls at `limit`.
    """
    for boundary in _BOUNDARIES:
        position = text.rfind(boundary, limit // 2, limit)
        if position >= 0:
            return min(position + len(boundary), limit)
    return limit


def pieces(chunks: Iterable[str], limit: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """The text that the chunks make up, as pieces of at most `limit` characters; holds one chunk and one piece."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > limit:
            end = start + cut_point(rest[start : start + limit + 1], limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest
