"""Documents from files: .jsonl (also .gz, .zst), .parquet and .txt, found by paths and globs.

Files are read in the order of their sorted paths, record by record. Whatever cannot be read is one sentence that names
file and line. Without a domain field a document's domain is the name of its file's directory.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.corpus import FilesSource
from corpus.documents import BadCorpus, Document, Keep
from corpus.pieces import pieces
from corpus.records import document_of

MAX_LINE_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")


def matching_paths(patterns: list[str]) -> list[Path]:
    """Every file that a path or glob names, sorted; raises BadCorpus for one that names none or an unknown kind."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise BadCorpus(f"corpus.source.paths: {pattern!r} matches no file (looked from {Path.cwd()})")
        found.update(files)
    for path in found:
        if not path.name.endswith(_SUFFIXES):
            raise BadCorpus(f"{path}: expected a file that ends in one of {', '.join(_SUFFIXES)}")
    return sorted(found)


def documents(source: FilesSource, keep: Keep) -> Iterator[Document]:
    """The documents of all files that `keep` accepts; raises BadCorpus at the first that cannot be read."""
    for path in matching_paths(source.paths):
        if path.stat().st_size == 0:
            raise BadCorpus(f"{path} is empty; remove it or leave it out of corpus.source.paths")
        read = _read_text(path) if path.suffix == ".txt" else _read_records(path, source)
        yield from (document for document in read if keep(document.text))


def _read_text(path: Path) -> Iterator[Document]:
    """A .txt file: one document, or several where it is long."""
    domain = _directory(path)
    for number, piece in enumerate(pieces(_decoded(path)), start=1):
        yield Document(piece, domain, source=f"{path}, part {number}")


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 1
    with open(path, "rb") as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n")
                raise BadCorpus(f"{path}, line {line}: {_undecodable(error)}") from None
            lines += chunk.count(b"\n")
            yield text.removeprefix("\ufeff").replace("\r\n", "\n")
            if not chunk:
                return


def _undecodable(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file to UTF-8 or leave it out"


def _read_records(path: Path, source: FilesSource) -> Iterator[Document]:
    rows = _parquet_rows(path, source) if path.suffix == ".parquet" else _json_lines(path)
    empty = True
    for where, record in rows:
        empty = False
        yield document_of(record, source, where, _directory(path))
    if empty:
        raise BadCorpus(f"{path} holds no record; remove it or leave it out of corpus.source.paths")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path) as file:
        try:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                where = f"{path}, line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise BadCorpus(f"{where}: longer than {MAX_LINE_BYTES} bytes; a line is one JSON record")
                if line.strip():
                    yield where, _record(line, where)
        except (OSError, EOFError, zlib.error) as error:
            raise BadCorpus(f"{path} cannot be decompressed: {error}") from None


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadCorpus(f"{where}: {_undecodable(error)}") from None
    except (ValueError, RecursionError) as error:
        raise BadCorpus(f"{where}: not JSON ({error}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise BadCorpus(f"{where}: a JSON {type(record).__name__}, but every line must be one JSON object")
    return record


def _opened(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.GzipFile(path)
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise BadCorpus(f"{path}: reading .zst needs the package zstandard; install dipaco[data]") from None
        return io.BufferedReader(_ZstandardReader(zstandard, path))
    return open(path, "rb")


class _ZstandardReader(io.RawIOBase):
    """The decompressed bytes of a .zst file; a broken one raises OSError, as gzip does."""

    def __init__(self, zstandard: Any, path: Path) -> None:
        self._error = zstandard.ZstdError
        self._file = open(path, "rb")  # noqa: SIM115
        self._reader = zstandard.ZstdDecompressor().stream_reader(self._file, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count: int = self._reader.readinto(buffer)
        except self._error as error:
            raise OSError(str(error)) from None
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _parquet_rows(path: Path, source: FilesSource) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadCorpus(f"{path}: reading .parquet needs the package pyarrow; install dipaco[data]") from None
    wanted = {source.text_field, source.domain_field, source.group_field}
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            for rows in file.iter_batches(batch_size=256, columns=columns):
                for record in rows.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise BadCorpus(f"{path}, after row {number}: not readable as parquet ({error})") from None


def _directory(path: Path) -> str:
    return path.absolute().parent.name or "text"
