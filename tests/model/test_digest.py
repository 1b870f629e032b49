from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from model import tensor_file
from model.digest import module_digest, run_digest, tensors_digest

TENSORS = {"b": np.array([[1.0, 2.0]], np.float32), "a": np.array([3.0], np.float32)}


def test_a_module_digest_is_what_it_is_defined_to_be(tmp_path: Path) -> None:
    """SHA-256 over sorted (name, dtype, shape, little-endian bytes), spelled out."""
    spelled = (
        b"a\0float32\x001\0" + np.float32(3).tobytes() + b"b\0float32\x001,2\0" + np.array([1, 2], np.float32).tobytes()
    )
    tensor_file.write(tmp_path / "x", TENSORS)
    assert module_digest(tmp_path / "x") == hashlib.sha256(spelled).hexdigest()


def test_every_part_counts() -> None:
    variants: list[dict[str, np.ndarray]] = [
        TENSORS,
        {"b": TENSORS["b"], "c": TENSORS["a"]},
        {"b": TENSORS["b"].reshape(2, 1), "a": TENSORS["a"]},
        {"b": TENSORS["b"] + 1, "a": TENSORS["a"]},
        {"b": TENSORS["b"].astype(np.float64), "a": TENSORS["a"]},
        {"b": TENSORS["b"]},
    ]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)


def test_a_run_digest_is_that_of_its_modules_in_any_order() -> None:
    modules = [("0.0", 3, "aa"), ("0.1", 3, "bb"), ("1.0", 12, "cc")]
    digest = run_digest(modules)
    assert run_digest(reversed(modules)) == digest
    changed = [[("0.0", 4, "aa"), *modules[1:]], [("0.0", 3, "ab"), *modules[1:]], modules[:2]]
    assert digest not in {run_digest(variant) for variant in changed}
    assert run_digest(modules[:1]) == hashlib.sha256(b"0.0\x003\0aa\0").hexdigest()
