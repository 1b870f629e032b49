"""Documents from a Hugging Face dataset by name, streamed: nothing but the examples in flight is held or stored."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from configs.corpus import HuggingFaceSource
from corpus.documents import BadCorpus, Document, Keep
from corpus.records import document_of


def documents(source: HuggingFaceSource, keep: Keep) -> Iterator[Document]:
    """The documents of the dataset that `keep` accepts, in its own order; `max_documents` limits the examples read."""
    examples = _examples(source)
    for number, example in enumerate(islice(examples, source.max_documents), start=1):
        document = document_of(
            example, source, f"dataset {source.name}, example {number}", source.subset or source.name
        )
        if keep(document.text):
            yield document


def _examples(source: HuggingFaceSource) -> Any:
    try:
        import datasets
    except ImportError:
        raise BadCorpus("corpus.source.kind 'hf' needs the package datasets; install dipaco[hf]") from None
    try:
        return datasets.load_dataset(source.name, source.subset, split=source.split, streaming=True)
    except Exception as error:  # whatever hub, network or builder raise is one sentence to the user
        raise BadCorpus(f"cannot open dataset {source.name!r} (split {source.split!r}): {error}") from None
