"""Multiple choice from held-out text: a context, how its document really goes on, and how three of its domain do.

Every item is a window of a document: BOS, N tokens of context, then the M tokens that really follow. The wrong endings
stand at the same place of windows of three other documents of the same domain, so that neither the domain nor the
position gives the true one away. All is chosen by hash: equal text, tokenizer and form give equal items, whatever
model answers them. Domains count alike, as far as they have windows. Pure numpy, torch-free.

Legend: W windows, n items, N context tokens, M ending tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64, UInt32, UInt64

from corpus.token_file import TokenFile
from dipaco.ending import Refused
from routing.positions import hashes
from routing.records import MIN_EVALUATED_TOKENS

ENDINGS = 4
CHANCE = 1 / ENDINGS
SEED = 0xC102E
# Windows of a domain from which wrong endings are taken, so that a large corpus costs no more than a small one.
_POOL = 4096


@dataclass(frozen=True, slots=True)
class ClozeForm:
    """How many items at most, and how long their parts are, in tokens."""

    items: int = 2000
    context_tokens: int = 64
    ending_tokens: int = 16

    @property
    def length(self) -> int:
        """Tokens of a window, BOS included."""
        return 1 + self.context_tokens + self.ending_tokens

    def check(self, prefix_tokens: int, sequence_length: int) -> None:
        """Raises Refused where nothing follows the router's prefix, or an item does not fit into a sequence."""
        if sequence_length < MIN_EVALUATED_TOKENS:
            raise Refused(
                f"sequences of this run have {sequence_length} tokens; to be measured they need {MIN_EVALUATED_TOKENS}"
            )
        if self.context_tokens <= prefix_tokens:
            raise Refused(
                f"a context of {self.context_tokens} tokens ends with the {prefix_tokens} on which this run routes, or "
                f"before; give --context {prefix_tokens + 1} or more"
            )
        if self.length > sequence_length:
            raise Refused(
                f"a context of {self.context_tokens} and an ending of {self.ending_tokens} tokens do not fit into the "
                f"run's sequences of {sequence_length} (one of them BOS); give a shorter --context or --ending"
            )


@dataclass(frozen=True, slots=True)
class ClozeItems:
    """The items; the first of their endings is the true one. `documents`: of the context, a number each.

    `left_out`: domains of the text from which no item could be made.
    """

    contexts: UInt32[np.ndarray, "n N1"]
    endings: UInt32[np.ndarray, "n 4 M"]
    domains: Int64[np.ndarray, " n"]
    documents: UInt64[np.ndarray, " n"]
    domain_names: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def digest(self) -> str:
        """Equal for equal items alone."""
        parts = (self.contexts.astype("<u4"), self.endings.astype("<u4"))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True, slots=True)
class _Windows:
    """Windows that are long enough, of all token files."""

    file: Int64[np.ndarray, " W"]
    position: Int64[np.ndarray, " W"]
    ids: UInt64[np.ndarray, " W"]
    documents: UInt64[np.ndarray, " W"]
    domains: Int64[np.ndarray, " W"]

    def take(self, chosen: npt.NDArray[np.int64]) -> _Windows:
        return _Windows(
            self.file[chosen], self.position[chosen], self.ids[chosen], self.documents[chosen], self.domains[chosen]
        )

    def __len__(self) -> int:
        return len(self.ids)


def cloze_items(files: Sequence[TokenFile], form: ClozeForm) -> ClozeItems:
    """The items of a text, by domain and hash; raises Refused where none can be made."""
    names = tuple(sorted({name for file in files for name in file.domain_names}))
    windows = _windows(files, names, form.length)
    of_domain = [np.flatnonzero(windows.domains == index) for index in range(len(names))]
    counts = [len(found) if _documents(windows, found) >= ENDINGS else 0 for found in of_domain]
    made: list[tuple[int, list[npt.NDArray[np.uint32]], np.uint64]] = []
    for domain, share in enumerate(even_shares(counts, form.items)):
        if share:
            mine = windows.take(of_domain[domain])
            order = np.argsort(hashes(mine.ids, SEED), kind="stable")
            made += [(domain, *item) for item in _of_domain(files, mine.take(order[:_POOL]), share, form)]
    if not made:
        raise Refused(
            f"no domain of the text has {ENDINGS} documents of {form.length - 1} tokens, which an item is made of; "
            "give shorter --context and --ending, or more text"
        )
    used = {domain for domain, _, _ in made}
    endings = np.stack([np.stack(sequences) for _, sequences, _ in made])  # (n, 4, 1 + N + M)
    start = 1 + form.context_tokens
    return ClozeItems(
        contexts=endings[:, 0, :start],
        endings=endings[:, :, start:],
        domains=np.array([domain for domain, _, _ in made], np.int64),
        documents=np.array([document for _, _, document in made], np.uint64),
        domain_names=names,
        left_out=tuple(name for index, name in enumerate(names) if index not in used),
    )


def even_shares(counts: Sequence[int], total: int) -> list[int]:
    """`total`, or all there is, over classes of these sizes: equal, but for those that have fewer."""
    shares, left = [0] * len(counts), total
    ascending = sorted(range(len(counts)), key=lambda index: counts[index])
    for place, index in enumerate(ascending):
        shares[index] = min(counts[index], left // (len(counts) - place))
        left -= shares[index]
    return shares


def _windows(files: Sequence[TokenFile], names: tuple[str, ...], length: int) -> _Windows:
    found = []
    for index, file in enumerate(files):
        positions = np.flatnonzero(np.asarray(file.lengths) >= length)
        places = np.array([names.index(name) for name in file.domain_names], np.int64)
        found.append(
            (
                np.full(len(positions), index, np.int64),
                positions,
                file.ids[positions].astype(np.uint64),
                file.documents[positions].astype(np.uint64),
                places[file.domains[positions]] if len(positions) else positions,
            )
        )
    file_of, position, ids, documents, domains = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _Windows(file_of, position, ids, documents, domains)


def _documents(windows: _Windows, chosen: npt.NDArray[np.int64]) -> int:
    return len(np.unique(windows.documents[chosen]))


def _of_domain(
    files: Sequence[TokenFile], pool: _Windows, share: int, form: ClozeForm
) -> list[tuple[list[npt.NDArray[np.uint32]], np.uint64]]:
    """At most `share` items of one domain: (true sequence and three wrong ones, document), in the order of the pool."""
    made: list[tuple[list[npt.NDArray[np.uint32]], np.uint64]] = []
    start = 1 + form.context_tokens
    for index in range(len(pool)):
        if len(made) == share:
            break
        own = _sequence(files, pool, index, form.length)
        sequences, documents = [own], {int(pool.documents[index])}
        order = np.argsort(hashes(pool.ids, SEED ^ int(pool.ids[index]) << 1), kind="stable")
        for other in order.tolist():
            if int(pool.documents[other]) in documents:
                continue
            wrong = _sequence(files, pool, other, form.length)
            if any(np.array_equal(wrong[start:], known[start:]) for known in sequences):
                continue
            documents.add(int(pool.documents[other]))
            sequences.append(np.concatenate([own[:start], wrong[start:]]))
            if len(sequences) == ENDINGS:
                made.append((sequences, pool.documents[index]))
                break
    return made


def _sequence(files: Sequence[TokenFile], pool: _Windows, index: int, length: int) -> npt.NDArray[np.uint32]:
    tokens: npt.NDArray[np.uint32] = (
        files[int(pool.file[index])].tokens(int(pool.position[index]))[:length].astype(np.uint32)
    )
    return tokens
