from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from configs.corpus import HuggingFaceSource
from corpus.documents import BadCorpus
from corpus.hugging_face import documents


def _library(monkeypatch: pytest.MonkeyPatch, examples: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        asked.update(name=name, subset=subset, split=split, streaming=streaming)
        if isinstance(examples, Exception):
            raise examples
        return examples

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


def _endless() -> Iterator[dict[str, Any]]:
    return ({"text": f"text {number}", "kind": "k"} for number in itertools.count())


def test_an_endless_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _library(monkeypatch, _endless())
    source = HuggingFaceSource(kind="hf", name="allenai/c4", subset="en", max_documents=4)
    read = list(documents(source, lambda text: not text.endswith("1")))
    assert [each.text for each in read] == ["text 0", "text 2", "text 3"]
    assert {each.domain for each in read} == {"en"}
    assert asked == {"name": "allenai/c4", "subset": "en", "split": "train", "streaming": True}


def test_fields_are_configured_and_missing_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _library(monkeypatch, _endless())
    source = HuggingFaceSource(kind="hf", name="d", domain_field="kind", max_documents=1)
    assert [each.domain for each in documents(source, lambda text: True)] == ["k"]
    _library(monkeypatch, [{"body": "x"}])
    with pytest.raises(BadCorpus, match="dataset d, example 1: no field 'text'"):
        list(documents(source, lambda text: True))


def test_what_the_library_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    _library(monkeypatch, ConnectionError("no network"))
    with pytest.raises(BadCorpus, match=r"cannot open dataset 'd' \(split 'train'\): no network"):
        list(documents(HuggingFaceSource(kind="hf", name="d"), lambda text: True))


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadCorpus, match=r"install dipaco\[hf\]"):
        list(documents(HuggingFaceSource(kind="hf", name="d"), lambda text: True))
