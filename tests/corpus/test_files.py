from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import FilesSource
from corpus.documents import BadCorpus, Document
from corpus.files import documents


def _read(*paths: Path | str, **fields: Any) -> list[Document]:
    return list(documents(FilesSource(kind="files", paths=[str(path) for path in paths], **fields), lambda text: True))


def _lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


RECORDS = [{"text": f"number {number}", "domain": "ab"[number % 2], "book": number} for number in range(5)]


def _write(folder: Path, kind: str) -> Path:
    path = folder / f"data{kind}"
    if kind == ".jsonl":
        path.write_bytes(_lines(*RECORDS))
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(_lines(*RECORDS)))
    elif kind == ".jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(_lines(*RECORDS[:2])) + zstandard.compress(_lines(*RECORDS[2:])))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_kind_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    read = _read(_write(tmp_path, kind), group_field="book")
    assert [(each.text, each.domain, each.group) for each in read] == [
        (record["text"], record["domain"], str(record["book"])) for record in RECORDS
    ]


def test_files_are_read_once_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    read = _read(tmp_path / "c.txt", tmp_path / "*.txt")
    assert [each.text for each in read] == ["text a", "text b", "text c"]


def test_the_directory_names_the_domain_where_no_field_does(tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "data.jsonl").write_bytes(
        _lines({"text": "one"}, {"text": "two", "domain": None}, {"text": "x", "domain": "d"})
    )
    (folder / "note.txt").write_text("a note")
    assert [each.domain for each in _read(folder / "*")] == ["letters", "letters", "d", "letters"]
    assert [each.domain for each in _read(folder / "*.jsonl", domain_field=None)] == ["letters"] * 3


def test_a_long_text_becomes_several_documents(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * 50 for number in range(300))
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    read = _read(tmp_path / "book.txt")
    assert len(read) > 3
    assert "".join(each.text for each in read) == text


def test_other_field_names_are_configured(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(_lines({"content": "c", "kind": 3}))
    read = _read(tmp_path / "data.jsonl", text_field="content", domain_field="kind")
    assert (read[0].text, read[0].domain) == ("c", "3")


GOOD = _lines({"text": "fine"})
BROKEN = {
    "empty.jsonl": (b"", r"empty\.jsonl is empty"),
    "blank.jsonl": (b"\n\n", r"blank\.jsonl holds no record"),
    "empty.txt": (b"", r"empty\.txt is empty"),
    "bytes.jsonl": (GOOD + b'{"text": "\xff"}\n', r"bytes\.jsonl, line 2: byte 0xff is not UTF-8"),
    "bytes.txt": ("é\n".encode() + b"ok\n\xe9 x", r"bytes\.txt, line 3: byte 0xe9 is not UTF-8"),
    "ends.txt": (b"cut \xc3", r"ends\.txt, line 1: byte 0xc3 is not UTF-8"),
    "json.jsonl": (GOOD + GOOD + b"{oops\n", r"json\.jsonl, line 3: not JSON"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl, line 1: a JSON list"),
    "field.jsonl": (_lines({"body": "x"}), r"field\.jsonl, line 1: no field 'text' \(there are \['body'\]\)"),
    "number.jsonl": (_lines({"text": 5}), r"number\.jsonl, line 1: field 'text' holds int, expected a string"),
    "domain.jsonl": (_lines({"text": "x", "domain": [1]}), r"domain\.jsonl, line 1: field 'domain' holds list"),
    "pair.jsonl": (b'{"text": "\\ud800"}\n', r"pair\.jsonl, line 1: character 0 .* surrogate"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-9], r"cut\.jsonl\.gz cannot be decompressed"),
    "plain.jsonl.gz": (GOOD, r"plain\.jsonl\.gz cannot be decompressed"),
    "plain.jsonl.zst": (GOOD, r"plain\.jsonl\.zst cannot be decompressed"),
    "plain.parquet": (GOOD, r"plain\.parquet, after row 0: not readable as parquet"),
    "data.csv": (GOOD, r"data\.csv: expected a file that ends in one of \.jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_sentence_with_file_and_line(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCorpus, match=message) as raised:
        _read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_missing_group_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(_lines({"text": "a", "book": "b"}, {"text": "c"}))
    with pytest.raises(BadCorpus, match=r"line 2: no field 'book'.*corpus\.source\.group_field"):
        _read(tmp_path / "data.jsonl", group_field="book")


def test_a_path_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(GOOD)
    with pytest.raises(BadCorpus, match=r"nothing\*\.jsonl' matches no file"):
        _read(tmp_path / "data.jsonl", tmp_path / "nothing*.jsonl")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.files.MAX_LINE_BYTES", 100)
    (tmp_path / "data.jsonl").write_bytes(GOOD + b" " * 200)
    with pytest.raises(BadCorpus, match="line 2: longer than 100 bytes"):
        _read(tmp_path / "data.jsonl")


def test_documents_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(GOOD + b"broken\n")
    stream = documents(FilesSource(kind="files", paths=[str(tmp_path / "data.jsonl")]), lambda text: True)
    assert next(stream).text == "fine"
    with pytest.raises(BadCorpus):
        next(stream)
