"""A seeded sample of training sequences with their features: what new text is compared with.

A run keeps the sequences of its training ranges and shards, and not their features: those of a bounded sample are
computed here.

Legend: N sampled sequences, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, UInt64

from corpus.token_file import TokenFile
from corpus.tokenizer import Tokenizer
from dipaco.run_router import RunRouter
from routing.features import first_prefix

EXCERPT_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """The beginnings of sampled sequences (BOS first), where they come from, and their features z."""

    beginnings: tuple[npt.NDArray[Any], ...]
    domains: tuple[str, ...]
    documents: UInt64[np.ndarray, " N"]
    z: Float32[np.ndarray, "N D"]

    def __len__(self) -> int:
        return len(self.beginnings)

    def excerpt(self, index: int, tokenizer: Tokenizer) -> str:
        """The beginning of a sampled sequence on one line."""
        return one_line(tokenizer.decode(self.beginnings[index][1:].tolist()))


def one_line(text: str) -> str:
    """A text's beginning without line breaks, cut where it is long."""
    words = " ".join(text.split())
    return words if len(words) <= EXCERPT_CHARACTERS else words[: EXCERPT_CHARACTERS - 1] + "…"


def take_sample(
    files: Sequence[Path], router: RunRouter, sequences: int, seed: int, say: Callable[[str], None]
) -> TrainingSample:
    """At most `sequences` of the sequences in token files, each as likely as any other; raises BadTokenFile."""
    prefix_tokens = router.frozen.prefix_tokens
    beginnings: list[npt.NDArray[Any]] = []
    domains: list[str] = []
    documents: list[int] = []
    counts = []
    for path in files:
        with TokenFile.open(path) as file:
            counts.append(file.count)
    chosen = _chosen(counts, sequences, seed)
    for path, positions in zip(files, chosen, strict=True):
        with TokenFile.open(path) as file:
            for position in positions:
                tokens = file.tokens(int(position))[: 1 + max(prefix_tokens, EXCERPT_CHARACTERS)]
                beginnings.append(np.array(tokens))
                domains.append(file.domain_names[file.domains[position]])
                documents.append(int(file.documents[position]))
    total = len(beginnings)
    z = router.features(
        [first_prefix(tokens, prefix_tokens) for tokens in beginnings],
        lambda done: say(f"features of {done:,} of {total:,} training sequences"),
    )
    return TrainingSample(tuple(beginnings), tuple(domains), np.array(documents, np.uint64), z)


def _chosen(counts: Sequence[int], sequences: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Ascending positions in each file, drawn without replacement from all files together."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    total = sum(counts)
    drawn = np.sort(generator.choice(total, min(sequences, total), replace=False))
    ends = np.cumsum(counts)
    return [
        drawn[(drawn >= end - count) & (drawn < end)] - (end - count) for end, count in zip(ends, counts, strict=True)
    ]


def domain_shares(files: Sequence[Path]) -> dict[str, float]:
    """The share that each domain has of the sequences in token files, the largest first."""
    counts: Counter[str] = Counter()
    for path in files:
        with TokenFile.open(path) as file:
            sizes = np.bincount(file.domains, minlength=len(file.domain_names))
            counts.update(dict(zip(file.domain_names, sizes.tolist(), strict=True)))
    total = max(1, counts.total())
    return {
        name: count / total for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count
    }
