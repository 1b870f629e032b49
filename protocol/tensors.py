"""How the outputs of a task travel: a header that declares them, then their bytes in chunks below gRPC's message limit.

The header is msgpack, validated with pydantic; the bytes are those of the blob at rest, so a transfer can continue at
any byte. Nothing here is code, and no message limit is ever raised to fit a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from protocol.tasks import Count, Digest, MalformedMessage, Message, unpack

DEFAULT_CHUNK_BYTES = 1024 * 1024
# gRPC refuses messages above 4 MiB unless told otherwise; the rest is room for field tags.
MAX_CHUNK_BYTES = 3 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024

Dimension = Annotated[int, Field(ge=0, lt=2**48)]
# Name, dtype and shape of one tensor.
DeclaredTensor = tuple[Annotated[str, Field(min_length=1)], Literal["float32"], list[Dimension]]


class UploadHeader(Message):
    """One output of a leased task: whose it is, which blob it is (`size` in bytes), and which tensors it holds.

    `worker_id` and `fence` are those of the lease: nobody else may write under it.
    `output` names it in the task's result: a module id, `inner_state`, `features`, `losses`, `tokens`, ...; partial
    progress is the output `checkpoint`. `offset` is the first byte that follows in this stream. `tensors` is empty for
    kinds that hold none.
    """

    worker_id: str = ""
    task_id: Annotated[str, Field(min_length=1)]
    fence: Annotated[int, Field(ge=0, lt=2**64)]
    output: Annotated[str, Field(min_length=1)]
    kind: Literal["module", "inner_state", "checkpoint", "record", "tokens"]
    codec: Literal["raw"] = "raw"
    tensors: list[DeclaredTensor] = Field(default_factory=list)
    digest: Digest
    size: Annotated[int, Field(ge=0, lt=2**63)]
    offset: Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.offset > self.size:
            raise ValueError(f"offset {self.offset} lies behind the blob's {self.size} bytes")
        names = [name for name, _, _ in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError("two tensors have the same name")
        return self


def decode_header(data: bytes) -> UploadHeader:
    """The header that opens an upload; raises MalformedMessage."""
    if len(data) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"an upload header of {len(data)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    try:
        return UploadHeader.model_validate(unpack(data))
    except ValidationError as error:
        raise MalformedMessage(f"malformed upload header: {error}") from None


def check_chunk(data: bytes, chunk_bytes: int) -> bytes:
    """The bytes of one message as they are; raises MalformedMessage where there are more than `chunk_bytes`."""
    if len(data) > chunk_bytes:
        raise MalformedMessage(f"a chunk of {len(data)} bytes; at most {chunk_bytes} are accepted in one message")
    return data


def file_chunks(path: Path, offset: int, chunk_bytes: int) -> Iterator[bytes]:
    """The bytes of a file from `offset` on, at most `chunk_bytes` at a time."""
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.read(chunk_bytes):
            yield data
