"""What an output of a task may be, and whether the bytes that came are that: digest, names, shapes, finite values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from configs.schema import InnerConfig
from coordinator.outer import squared_norm
from model import tensor_file
from model.inner_state import checkpoint_tensors, inner_state_tensors
from model.layout import ModuleSpec, TensorSpec
from protocol.errors import CorruptBlob, RejectedTensor
from protocol.tensors import UploadHeader

RECORD_BYTES = 256 * 1024**2
TOKENS_BYTES = 4 * 1024**3
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class ExpectedOutput:
    """Exactly these tensors (`module`, `inner_state`, `checkpoint`), or a bounded number of any bytes (the others)."""

    kind: Literal["module", "inner_state", "checkpoint", "record", "tokens"]
    max_bytes: int
    tensors: tuple[TensorSpec, ...] = ()

    @classmethod
    def module(cls, spec: ModuleSpec) -> ExpectedOutput:
        """A contribution to a module."""
        return cls("module", _file_bytes(spec.tensors), spec.tensors)

    @classmethod
    def inner_state(cls, inner: InnerConfig, path_tensors: Sequence[TensorSpec]) -> ExpectedOutput:
        """What the inner optimizer keeps of the tensors of a path."""
        tensors = inner_state_tensors(inner, path_tensors)
        return cls("inner_state", _file_bytes(tensors), tensors)

    @classmethod
    def checkpoint(cls, inner: InnerConfig, path_tensors: Sequence[TensorSpec]) -> ExpectedOutput:
        """Partial progress: the parameters of a path beside its inner state."""
        tensors = checkpoint_tensors(inner, path_tensors)
        return cls("checkpoint", _file_bytes(tensors), tensors)

    @classmethod
    def record(cls, max_bytes: int = RECORD_BYTES) -> ExpectedOutput:
        """Features, assignments, routes or losses; what is in them is checked with the task's result."""
        return cls("record", max_bytes)

    @classmethod
    def tokens(cls, max_bytes: int = TOKENS_BYTES) -> ExpectedOutput:
        """A token file; what is in it is checked with the task's result."""
        return cls("tokens", max_bytes)

    def check_header(self, header: UploadHeader) -> None:
        """Refuse an upload by what it declares, before a byte of it is taken. Raises RejectedTensor."""
        what = _name(header)
        if header.kind != self.kind:
            raise RejectedTensor(f"{what} is announced as {header.kind}, expected {self.kind}")
        self._check_declared(what, {name: tuple(shape) for name, _, shape in header.tensors})
        if self.tensors and header.size != self.max_bytes:
            raise RejectedTensor(f"{what} has {header.size} bytes, expected exactly {self.max_bytes}")
        if header.size > self.max_bytes:
            raise RejectedTensor(f"{what} has {header.size} bytes; at most {self.max_bytes} are accepted")

    def _check_declared(self, what: str, declared: dict[str, tuple[int, ...]]) -> None:
        for spec in self.tensors:
            if spec.name not in declared:
                raise RejectedTensor(f"{what} lacks {spec.name} of shape {spec.shape}")
            if (shape := declared.pop(spec.name)) != spec.shape:
                raise RejectedTensor(f"{what}: {spec.name} has shape {shape}, expected {spec.shape}")
        if declared:
            raise RejectedTensor(f"{what} holds {min(declared)}, which is not expected")

    def check_file(self, path: Path, header: UploadHeader) -> float:
        """The L2 norm of a whole upload's tensors (0 without tensors).

        Raises CorruptBlob for another digest, RejectedTensor naming the tensor that is not as expected.
        """
        what = _name(header)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != header.digest:
            raise CorruptBlob(f"{what} has digest {digest}, announced as {header.digest}; send it from the start")
        if not self.tensors:
            return 0.0
        try:
            tensor_file.open_flat(path, self.tensors)
        except tensor_file.TensorMismatch as error:
            raise RejectedTensor(f"{what}: {error}") from None
        return self._norm(path, what)

    def _norm(self, path: Path, what: str) -> float:
        squares = 0.0
        with path.open("rb") as file:
            file.seek(len(tensor_file.header_bytes(self.tensors)))
            for spec in sorted(self.tensors, key=lambda spec: spec.name):
                for first in range(0, spec.num_elements, _CHUNK_ELEMENTS):
                    chunk = np.fromfile(file, "<f4", min(_CHUNK_ELEMENTS, spec.num_elements - first))
                    if not np.isfinite(chunk).all():
                        raise RejectedTensor(f"{what}: {spec.name} holds a value that is not finite")
                    squares += squared_norm(chunk)
        return math.sqrt(squares)


def _file_bytes(tensors: Sequence[TensorSpec]) -> int:
    return len(tensor_file.header_bytes(tensors)) + 4 * tensor_file.num_elements(tensors)


def _name(header: UploadHeader) -> str:
    return f"output {header.output!r} of task {header.task_id}"
