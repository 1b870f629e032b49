from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from model import tensor_file
from model.layout import TensorSpec
from model.store import file_digest
from model.tensor_file import TensorMismatch, Writer

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([7, 8], np.float32)}
SPECS = [TensorSpec("a", (2,)), TensorSpec("b", (2, 3))]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensor_file.write(tmp_path / "x", TENSORS)
    return tmp_path / "x"


def rewrite_header(file: Path, header: dict[str, object]) -> None:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


shapes = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters='"\\'), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.lists(st.integers(1, 4), max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_what_is_written_is_a_safetensors_file(shapes: dict[str, list[int]]) -> None:
    tensors = {
        name: np.random.default_rng(0).standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "x"
        assert tensor_file.write(file, tensors) == file_digest(file)
        for found in (load_file(file), tensor_file.read(file)):
            assert found.keys() == tensors.keys()
            assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
        specs = [(name, tensor.shape) for name, tensor in tensors.items()]
        flat = np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])
        assert np.array_equal(tensor_file.open_flat(file, specs), flat)


def test_the_bytes_are_fixed(file: Path) -> None:
    """Golden: another header or order would change every digest of every run."""
    expected = (
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}'
    )
    text = expected.encode() + b" " * (-len(expected) % 8)
    flat = np.array([7, 8, 0, 1, 2, 3, 4, 5], "<f4").tobytes()
    assert file.read_bytes() == len(text).to_bytes(8, "little") + text + flat
    assert tensor_file.header_bytes(list(reversed(SPECS))) == len(text).to_bytes(8, "little") + text


def test_chunks_of_any_size_make_the_same_file(file: Path, tmp_path: Path) -> None:
    flat = np.array(tensor_file.open_flat(file, SPECS))
    with Writer(tmp_path / "y", SPECS) as writer:
        for begin, end in ((0, 1), (1, 1), (1, 7), (7, 8)):
            writer.append(flat[begin:end])
        assert writer.finish() == file_digest(file)


def test_views_are_private(file: Path) -> None:
    before = file.read_bytes()
    tensor_file.read(file)["a"][0] = 100.0
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        tensor_file.open_flat(file, SPECS)[0] = 100.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(9, np.float32), "1 elements more"),
        (np.zeros(7, np.float32), "1 elements missing"),
        (np.zeros(8, np.float64), "float64"),
    ],
)
def test_the_writer_counts(tmp_path: Path, values: np.ndarray, message: str) -> None:
    def write() -> None:
        with Writer(tmp_path / "y", SPECS) as writer:
            writer.append(values)
            writer.finish()

    with pytest.raises(TensorMismatch, match=message):
        write()
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([("a", (2,))], "holds b, which is not expected"),
        ([("a", (2,)), ("b", (2, 3)), ("c", (1,))], "lacks c"),
        ([("a", (2,)), ("b", (3, 2))], r"b has shape \(2, 3\), expected \(3, 2\)"),
        ([("a", (2,)), ("a", (2,))], "same name"),
    ],
)
def test_what_differs_is_named(file: Path, specs: list[tuple[str, tuple[int, ...]]], message: str) -> None:
    with pytest.raises(TensorMismatch, match=message):
        tensor_file.open_flat(file, specs)
    with pytest.raises(TensorMismatch, match=message):
        tensor_file.read(file, specs)


def test_only_one_form_is_accepted(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x", metadata={"who": "ever"})
    with pytest.raises(TensorMismatch, match=r"metadata|not a tensor file"):
        tensor_file.open_flat(tmp_path / "x", SPECS)


def test_a_cut_file_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for length in (0, 5, 40, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(TensorMismatch):
            tensor_file.open_flat(file, SPECS)
        with pytest.raises(TensorMismatch):
            tensor_file.read(file)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        [],
    ],
)
def test_a_malicious_header_is_refused(file: Path, header: dict[str, object]) -> None:
    rewrite_header(file, header)
    with pytest.raises(TensorMismatch):
        tensor_file.read(file)
    with pytest.raises(TensorMismatch):
        tensor_file.open_flat(file, SPECS)
