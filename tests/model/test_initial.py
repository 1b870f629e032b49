from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from model.digest import module_digest
from model.initial import initial_chunks, initial_tensor, write_initial_module
from model.layout import TensorSpec, module_spec
from tests.model.conftest import TWO_BY_TWO, VOCAB_SIZE, tiny_model, topology


def test_golden_digest(tmp_path: Path) -> None:
    """These bits are the start of every run with this seed: a change of them is a change of the numerics version."""
    model = tiny_model(qk_norm=True)
    digests = []
    for module_id in ("0.0", "0.1", "1.1"):
        spec = module_spec(model, VOCAB_SIZE, topology(TWO_BY_TWO), module_id)
        write_initial_module(tmp_path / module_id, spec, model, seed=7)
        digests.append(module_digest(tmp_path / module_id)[:16])
    assert digests == ["234dcc067a3335f7", "234dcc067a3335f7", "74d117632456c65f"]


def test_distribution() -> None:
    model = tiny_model(init_std=0.02)
    for name, std in (("q_proj", 0.02), ("o_proj", 0.02 / math.sqrt(8)), ("down_proj", 0.02 / math.sqrt(8))):
        values = initial_tensor(TensorSpec(f"model.layers.0.{name}.weight", (300, 200)), model, seed=0)
        assert values.dtype == np.float32
        assert abs(values.mean()) < std / 50
        assert abs(values.std() / std - 1) < 0.02
    assert (initial_tensor(TensorSpec("model.norm.weight", (9,)), model, seed=0) == 1).all()


def test_values_depend_on_seed_and_name_only() -> None:
    model = tiny_model()
    one, other = (TensorSpec(f"model.layers.{block}.mlp.up_proj.weight", (48, 32)) for block in range(2))
    assert np.array_equal(initial_tensor(one, model, 0), initial_tensor(one, model, 0))
    assert not np.array_equal(initial_tensor(one, model, 0), initial_tensor(other, model, 0))
    assert not np.array_equal(initial_tensor(one, model, 0), initial_tensor(one, model, 1))


def test_chunks_do_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, model = TensorSpec("lm_head.weight", (30, 7)), tiny_model()
    whole = initial_tensor(tensor, model, 0)
    monkeypatch.setattr("model.initial._CHUNK_ELEMENTS", 64)
    chunks = list(initial_chunks(tensor, model, 0))
    assert [chunk.size for chunk in chunks] == [64, 64, 64, 18]
    assert np.array_equal(np.concatenate(chunks).reshape(30, 7), whole)
