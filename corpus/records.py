"""A record of a dataset (JSON object, parquet row, Hugging Face example) to a document, by the names of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.corpus import FilesSource, HuggingFaceSource
from corpus.documents import BadCorpus, Document


def document_of(
    record: Mapping[str, Any], source: FilesSource | HuggingFaceSource, where: str, domain: str
) -> Document:
    """The document in a record; `domain` stands in where the record names none. Raises BadCorpus, naming `where`."""
    text = _text(record, source.text_field, "text_field", where)
    if source.domain_field is not None and record.get(source.domain_field) is not None:
        domain = _label(record, source.domain_field, "domain_field", where)
    group = _label(record, source.group_field, "group_field", where) if source.group_field is not None else None
    return Document(text, domain, group, where)


def _text(record: Mapping[str, Any], field: str, key: str, where: str) -> str:
    if field not in record:
        raise BadCorpus(f"{where}: no field {field!r} (there are {sorted(record)}); set corpus.source.{key}")
    value = record[field]
    if not isinstance(value, str):
        raise BadCorpus(f"{where}: field {field!r} holds {type(value).__name__}, expected a string")
    return value


def _label(record: Mapping[str, Any], field: str, key: str, where: str) -> str:
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(record, field, key, where)
