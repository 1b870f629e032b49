"""Upload headers: what is accepted, and that rubbish is refused by name."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.tasks import MalformedMessage, decode_capabilities, decode_result, decode_spec, encode
from protocol.tensors import MAX_HEADER_BYTES, UploadHeader, check_chunk, decode_header, file_chunks

GOOD: dict[str, Any] = {
    "task_id": "train/TRAIN/0/3",
    "fence": 2,
    "output": "0.1",
    "kind": "module",
    "tensors": [["model.norm.weight", "float32", [8]], ["scale", "float32", []]],
    "digest": "0f" * 32,
    "size": 100,
    "offset": 40,
}


def test_a_header_survives_the_wire() -> None:
    header = decode_header(msgpack.packb(GOOD))
    assert header.tensors == [("model.norm.weight", "float32", [8]), ("scale", "float32", [])]
    assert header.codec == "raw"
    assert decode_header(encode(header)) == header == UploadHeader.model_validate(GOOD)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fence": -1}, "fence"),
        ({"task_id": ""}, "task_id"),
        ({"kind": "program"}, "kind"),
        ({"codec": "pickle"}, "codec"),
        ({"digest": "0F" * 32}, "digest"),
        ({"offset": 101}, "offset 101 lies behind"),
        ({"size": 2**63}, "size"),
        ({"tensors": [["a", "object", [1]]]}, "tensors"),
        ({"tensors": [["a", "float32", [-1]]]}, "tensors"),
        ({"tensors": [["a", "float32", [1]], ["a", "float32", [2]]]}, "same name"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_bad_header_names_what_is_wrong(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(MalformedMessage, match=named):
        decode_header(msgpack.packb(GOOD | changes))


def test_a_header_is_bounded() -> None:
    with pytest.raises(MalformedMessage, match="at most"):
        decode_header(bytes(MAX_HEADER_BYTES + 1))


@given(st.binary(max_size=300))
def test_rubbish_is_malformed_and_nothing_else(data: bytes) -> None:
    for decode in (decode_header, decode_spec, decode_result, decode_capabilities):
        with pytest.raises(MalformedMessage):
            decode(data)


@pytest.mark.parametrize(
    "data", [b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_deep_or_boundless_msgpack_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_result(data)


def test_a_chunk_is_bounded() -> None:
    assert check_chunk(b"abc", 3) == b"abc"
    with pytest.raises(MalformedMessage, match="a chunk of 4 bytes; at most 3"):
        check_chunk(b"abcd", 3)


@given(data=st.binary(max_size=50), offset=st.integers(0, 60), chunk_bytes=st.integers(1, 20))
def test_file_chunks_are_the_rest_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "file"
    path.write_bytes(data)
    chunks = list(file_chunks(path, offset, chunk_bytes))
    assert b"".join(chunks) == data[offset:]
    assert all(0 < len(chunk) <= chunk_bytes for chunk in chunks)
