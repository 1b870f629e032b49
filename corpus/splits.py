"""The five disjoint splits, by hash of the whole normalised document or of its group; never by position."""

from __future__ import annotations

import hashlib

from configs.corpus import SplitsConfig
from corpus.documents import normalised

SPLITS = ("train", "router", "stop", "validation", "test")


def split_of(text: str, group: str | None, config: SplitsConfig) -> str:
    """The split of a document: one of SPLITS. `group`, where given, decides instead of the text."""
    key = f"group\0{group}" if group is not None else f"text\0{normalised(text)}"
    point = int.from_bytes(hashlib.sha256(f"split\0{key}".encode()).digest()[:8], "big") / 2**64
    edge = 0.0
    for split in SPLITS[1:]:
        edge += getattr(config, split)
        if point < edge:
            return split
    return "train"
