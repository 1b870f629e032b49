from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference.module_cache import DamagedModule, ModuleCache
from model.layout import level_tensors
from model.store import UnknownBlob
from tests.inference.conftest import VOCAB_SIZE, Mixture


def test_the_least_recently_used_goes_first(mixture: Mixture) -> None:
    first, second = (level_tensors(mixture.config, VOCAB_SIZE, level) for level in mixture.topology.levels)
    size = sum(4 * tensor.num_elements for tensor in second)
    cache = ModuleCache(mixture.store, budget_bytes=2 * size)
    cache.get("1.0", mixture.digests["1.0"], second)
    cache.get("1.1", mixture.digests["1.1"], second)
    cache.get("1.0", mixture.digests["1.0"], second)
    assert (cache.reads, cache.num_bytes) == (2, 2 * size)
    cache.get("0.0", mixture.digests["0.0"], first)  # larger than one of them: both must go, or it is not kept
    assert cache.num_bytes <= 2 * size
    cache.get("0.0", mixture.digests["0.0"], first)
    assert cache.reads == 3


def test_a_module_beyond_the_budget_is_read_and_not_kept(mixture: Mixture) -> None:
    specs = level_tensors(mixture.config, VOCAB_SIZE, mixture.topology.levels[0])
    cache = ModuleCache(mixture.store, budget_bytes=100)
    assert cache.get("0.0", mixture.digests["0.0"], specs).keys() == {tensor.name for tensor in specs}
    cache.get("0.0", mixture.digests["0.0"], specs)
    assert (cache.reads, cache.num_bytes) == (2, 0)


def test_an_absent_module_is_an_error_that_names_it(mixture: Mixture) -> None:
    with pytest.raises(UnknownBlob, match="f" * 64):
        ModuleCache(mixture.store, 1000).get("0.0", "f" * 64, ())


def test_a_damaged_module_is_refused_by_name(mixture: Mixture) -> None:
    specs = level_tensors(mixture.config, VOCAB_SIZE, mixture.topology.levels[0])
    file = mixture.store.path(mixture.digests["0.0"])
    spoil(file)
    with pytest.raises(DamagedModule, match=rf"module 0\.0 is damaged: blob .*{file.name}.*; put back"):
        ModuleCache(mixture.store, 1 << 20).get("0.0", file.name, specs)


def test_a_module_is_verified_once(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []
    monkeypatch.setattr(mixture.store, "verify", verified.append)
    specs = level_tensors(mixture.config, VOCAB_SIZE, mixture.topology.levels[0])
    cache = ModuleCache(mixture.store, budget_bytes=100)
    first, second = (cache.get("0.0", mixture.digests["0.0"], specs) for _ in range(2))
    assert verified == [mixture.digests["0.0"]]
    assert all(torch.equal(first[name], second[name]) for name in first)


def spoil(file: Path) -> None:
    """Flip one bit of the last weight, so that size and header stay right."""
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)
