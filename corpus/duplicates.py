"""Near-duplicate documents: those with more than half of their 8-word shingles already seen.

Shingles are remembered in two Bloom filters (Bloom 1970) of fixed size. When the newer one is full the older one is
dropped, so memory does not grow with the corpus: what is compared is a moving window of some tens of millions of words.

Legend: S shingles of a document.
"""

from __future__ import annotations

import zlib

import numpy as np
from jaxtyping import UInt64

from corpus.documents import normalised

SHINGLE_WORDS = 8
_MULTIPLIERS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, SHINGLE_WORDS + 1)], np.uint64)


def shingles(text: str) -> UInt64[np.ndarray, " S"]:
    """Distinct 64-bit hashes of the runs of eight words; a shorter text is one shingle of all its words."""
    words = np.fromiter(map(zlib.crc32, normalised(text).encode("utf-8").split()), np.uint64)
    if words.size < SHINGLE_WORDS:
        words = np.pad(words, (0, SHINGLE_WORDS - words.size))
    runs = np.lib.stride_tricks.sliding_window_view(words, SHINGLE_WORDS)
    hashes: np.ndarray = np.unique(_mixed((runs * _MULTIPLIERS).sum(axis=1, dtype=np.uint64)))
    return hashes


def _mixed(values: UInt64[np.ndarray, " S"]) -> UInt64[np.ndarray, " S"]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


class NearDuplicates:
    """Remembers the shingles of the documents that were kept; `log2_bits` sets the size of each of the two filters."""

    def __init__(self, log2_bits: int = 27) -> None:
        self._mask = np.uint64(2**log2_bits - 1)
        self._capacity = 2**log2_bits // 16
        self._filters = [np.zeros(2**log2_bits // 8, np.uint8), np.zeros(2**log2_bits // 8, np.uint8)]
        self._stored = 0

    def add(self, text: str) -> bool:
        """Whether the text is new; only then are its shingles remembered."""
        hashes = shingles(text)
        places = [hashes & self._mask, (hashes >> np.uint64(32)) & self._mask]
        seen = np.zeros(hashes.size, bool)
        for bits in self._filters:
            seen |= _are_set(bits, places[0]) & _are_set(bits, places[1])
        if 2 * int(seen.sum()) > hashes.size:
            return False
        self._remember(places)
        return True

    def _remember(self, places: list[UInt64[np.ndarray, " S"]]) -> None:
        if self._stored + places[0].size > self._capacity and self._stored:
            self._filters = [np.zeros_like(self._filters[0]), self._filters[0]]
            self._stored = 0
        for place in places:
            np.bitwise_or.at(self._filters[0], place >> np.uint64(3), _bit(place))
        self._stored += places[0].size


def _bit(places: UInt64[np.ndarray, " S"]) -> np.ndarray:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))


def _are_set(bits: np.ndarray, places: UInt64[np.ndarray, " S"]) -> np.ndarray:
    found: np.ndarray = (bits[places >> np.uint64(3)] & _bit(places)) != 0
    return found
