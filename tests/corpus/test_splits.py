from __future__ import annotations

from collections import Counter

from configs.corpus import SplitsConfig
from corpus.documents import document_id
from corpus.splits import SPLITS, split_of


def test_shares_are_kept() -> None:
    config = SplitsConfig(router=0.1, stop=0.1, validation=0.2, test=0.1)
    counts = Counter(split_of(f"document number {number}", None, config) for number in range(4000))
    assert set(counts) == set(SPLITS)
    for split, share in {"router": 0.1, "stop": 0.1, "validation": 0.2, "test": 0.1, "train": 0.5}.items():
        assert abs(counts[split] / 4000 - share) < 0.03


def test_white_space_and_case_do_not_change_the_split_or_the_id() -> None:
    config = SplitsConfig(test=0.5)
    for number in range(50):
        text, rewritten = f"Some text {number}\n", f"  some\tTEXT  {number}"
        assert split_of(text, None, config) == split_of(rewritten, None, config)
        assert document_id(text) == document_id(rewritten)


def test_a_group_stays_together_whatever_its_texts() -> None:
    config = SplitsConfig(test=0.3, validation=0.3)
    for group in map(str, range(20)):
        assert len({split_of(f"text {number}", group, config) for number in range(20)}) == 1
    assert len({split_of("same text", str(group), config) for group in range(40)}) > 1


def test_a_larger_held_out_share_only_takes_from_train() -> None:
    small, large = SplitsConfig(test=0.05), SplitsConfig(test=0.2)
    for number in range(500):
        before, after = (split_of(f"text {number}", None, config) for config in (small, large))
        assert after == before or (before, after) == ("train", "test")
