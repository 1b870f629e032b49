"""Sequences of a document: windows of at most sequence_length - 1 tokens, each behind a BOS; EOS only at the end.

The one function that cuts tokens for training, evaluation and serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def windows(
    tokens: Sequence[int], sequence_length: int, bos_id: int, eos_id: int, complete: bool = True
) -> Iterator[list[int]]:
    """The sequences of a document, each of 2..sequence_length tokens and starting with BOS.

    `complete`: the tokens reach the document's end, which EOS marks; a prompt is not complete.
    """
    body = [*tokens, eos_id] if complete else list(tokens)
    step = sequence_length - 1
    for start in range(0, len(body), step):
        yield [bos_id, *body[start : start + step]]
