"""A document: the unit that is split, deduplicated and cut into sequences, and what is said when one cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass


class BadCorpus(ValueError):
    """Text that cannot become a corpus; the message names the file and line, and what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text of one domain. Documents of one `group` fall into the same split; `source` says where the text stands."""

    text: str
    domain: str
    group: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadCorpus(f"{self.source}: character {error.start} of the text is half a surrogate pair") from None


Keep = Callable[[str], bool]
"""Whether a text is to become a document: long enough, and not seen before."""


def normalised(text: str) -> str:
    """The text that decides identity: lower case, runs of white space as one space."""
    return " ".join(text.lower().split())


def document_id(text: str) -> str:
    """16 hex digits of the SHA-256 of the normalised text."""
    return hashlib.sha256(normalised(text).encode("utf-8")).hexdigest()[:16]
