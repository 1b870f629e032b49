"""A sample of texts of bounded size, uniform over the stream and independent of its order: those of smallest hash."""

from __future__ import annotations

import heapq

from corpus.documents import document_id


class TextSample:
    """Keeps the texts whose ids are smallest, as many as fit into `characters` (at least one)."""

    def __init__(self, characters: int) -> None:
        self._limit = characters
        self._characters = 0
        self._heap: list[tuple[int, str]] = []  # largest id first

    def add(self, text: str) -> None:
        """Offer one text."""
        heapq.heappush(self._heap, (-int(document_id(text), 16), text))
        self._characters += len(text)
        while self._characters > self._limit and len(self._heap) > 1:
            self._characters -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> list[str]:
        """The sample in the order of ids."""
        return [text for _, text in sorted(self._heap, reverse=True)]
