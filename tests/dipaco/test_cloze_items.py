"""Items of a cloze are the text's own: true endings, and those of other documents of the domain at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from corpus.token_file import SequenceIndex, TokenFile, write_token_file
from dipaco.cloze_items import ENDINGS, ClozeForm, ClozeItems, cloze_items, even_shares
from dipaco.ending import Refused

FORM = ClozeForm(items=30, context_tokens=9, ending_tokens=5)
Window = tuple[int, str, int, list[int]]  # id, domain, document, tokens


def text(domains: dict[str, int], windows: int = 3, length: int = 20) -> list[Window]:
    """So many documents a domain, each of so many windows; every token tells its window and place: no two are equal."""
    made: list[Window] = []
    for domain, documents in domains.items():
        for document in range(documents):
            owner = 1000 * sorted(domains).index(domain) + document
            for _ in range(windows):
                number = len(made)
                made.append((number, domain, owner, [0, *(100 * (number + 1) + place for place in range(1, length))]))
    return made


def token_file(path: Path, windows: Sequence[Window]) -> TokenFile:
    names = tuple(sorted({domain for _, domain, _, _ in windows}))
    index = SequenceIndex(
        ids=np.array([each[0] for each in windows], np.uint64),
        lengths=np.array([len(each[3]) for each in windows], np.uint32),
        domains=np.array([names.index(each[1]) for each in windows], np.uint16),
        documents=np.array([each[2] for each in windows], np.uint64),
        domain_names=names,
    )
    write_token_file(path, index, "uint16", [np.array(each[3], np.uint16) for each in windows])
    return TokenFile.open(path)


def items_of(folder: Path, windows: Sequence[Window], form: ClozeForm = FORM) -> ClozeItems:
    return cloze_items([token_file(folder / "tokens", windows)], form)


def test_an_item_is_a_window_and_three_endings_of_other_documents_of_its_domain(tmp_path: Path) -> None:
    windows = text({"law": 6, "code": 5})
    items = items_of(tmp_path, windows)
    assert len(items) == 30
    for context, endings, domain, document in zip(
        items.contexts, items.endings, items.domains, items.documents, strict=True
    ):
        numbers = [int(ending[0]) // 100 - 1 for ending in endings]
        owners = [windows[number] for number in numbers]
        assert context.tolist() == owners[0][3][:10]
        assert [ending.tolist() for ending in endings] == [owner[3][10:15] for owner in owners]
        assert {owner[1] for owner in owners} == {items.domain_names[domain]}
        assert len({owner[2] for owner in owners}) == ENDINGS
        assert owners[0][2] == document
    assert len({int(context[1]) for context in items.contexts}) == 30, "no window twice"


def test_equal_text_gives_equal_items_however_it_is_stored(tmp_path: Path) -> None:
    windows = text({"law": 6, "code": 5})
    one = items_of(tmp_path, windows)
    first = token_file(tmp_path / "first", [each for each in windows if each[0] % 3])
    second = token_file(tmp_path / "second", [each for each in windows if each[0] % 3 == 0])
    two = cloze_items([second, first], FORM)
    assert two.digest == one.digest
    assert two.documents.tolist() == one.documents.tolist()
    fewer = cloze_items([first], FORM)
    assert fewer.digest != one.digest


def test_fewer_items_are_the_first_of_more(tmp_path: Path) -> None:
    windows = text({"law": 6})
    many, few = (items_of(tmp_path, windows, ClozeForm(count, 9, 5)) for count in (12, 4))
    assert np.array_equal(many.contexts[:4], few.contexts)
    assert np.array_equal(many.endings[:4], few.endings)


def test_windows_that_are_too_short_do_not_count(tmp_path: Path) -> None:
    windows = [*text({"law": 6}, length=15), (900, "law", 77, list(range(14)))]
    items = items_of(tmp_path, windows)
    assert len(items) == 18
    assert 77 not in items.documents


def test_a_domain_with_three_documents_is_left_out_and_named(tmp_path: Path) -> None:
    items = items_of(tmp_path, text({"law": 4, "code": 3}))
    assert items.left_out == ("code",)
    assert set(items.domains.tolist()) == {1}
    with pytest.raises(Refused, match="no domain of the text has 4 documents of 14 tokens"):
        items_of(tmp_path, text({"code": 3}))


def test_an_ending_that_is_the_true_one_is_no_wrong_one(tmp_path: Path) -> None:
    """Documents 1 and 2 go on alike, so that of five documents only four endings are left."""
    windows = text({"law": 5}, windows=1)
    windows[2][3][10:15] = windows[1][3][10:15]
    items = items_of(tmp_path, windows)
    assert len(items) == 5
    assert all(len({tuple(ending) for ending in each.tolist()}) == ENDINGS for each in items.endings)


def test_domains_count_alike_as_far_as_they_have_windows(tmp_path: Path) -> None:
    assert even_shares([5, 100, 0, 40], 60) == [5, 28, 0, 27]
    assert even_shares([5, 6], 60) == [5, 6]
    assert sum(even_shares([9, 9, 9], 10)) == 10
    items = items_of(tmp_path, text({"law": 20, "code": 4}))
    assert np.bincount(items.domains).tolist() == [12, 18]


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (ClozeForm(9, 32, 16), "a context of 32 tokens ends with the 32 .* give --context 33 or more"),
        (ClozeForm(9, 100, 28), "a context of 100 and an ending of 28 tokens do not fit .* sequences of 128"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(form: ClozeForm, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        form.check(32, 128)


def test_a_form_that_just_fits_is_none() -> None:
    ClozeForm(9, 33, 94).check(32, 128)
    with pytest.raises(Refused, match="sequences of this run have 48 tokens; to be measured they need 64"):
        ClozeForm(9, 20, 4).check(8, 48)
