"""Modules in memory in the precision they are served in, bounded in bytes."""

from __future__ import annotations

import pytest
import torch

from inference.module_cache import DamagedModule
from inference.precision import (
    Int8Weight,
    Precision,
    UnknownPrecision,
    check_precision,
    lower,
    matrix_bytes,
    project,
    rows_of,
)
from inference.resident_modules import ResidentModules
from model.store import UnknownBlob
from tests.inference.conftest import VOCAB_SIZE, Mixture


def resident(mixture: Mixture, budget_bytes: int, precision: Precision = "float32") -> ResidentModules:
    return ResidentModules(mixture.store, mixture.config, VOCAB_SIZE, mixture.topology, budget_bytes, precision)


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 16, 40])
@pytest.mark.parametrize("shape", [(48, 32), (40, 24)], ids=["tiles", "no tiles"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.01), ("int8", 0.02)])
def test_products_are_the_same_by_every_kernel(
    rows: int, shape: tuple[int, int], precision: Precision, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(shape, generator=generator), torch.randn(rows, shape[1], generator=generator)
    exact = x @ weight.t()
    lowered = lower(weight, precision)
    found = project(x, lowered)
    assert found.shape == exact.shape
    assert found.is_contiguous()
    assert (found.float() - exact).norm() < tolerance * exact.norm()
    assert lowered.nbytes == matrix_bytes(precision, *shape)
    ids = torch.tensor([3, 0, 3])
    assert (rows_of(lowered, ids) - weight[ids]).norm() < tolerance * weight[ids].norm()


def test_a_row_of_zeros_stays_one() -> None:
    lowered = lower(torch.zeros(16, 16), "int8")
    assert isinstance(lowered, Int8Weight)
    assert torch.equal(project(torch.ones(1, 16), lowered).float(), torch.zeros(1, 16))


def test_an_unknown_precision_is_refused() -> None:
    assert check_precision("int8") == "int8"
    with pytest.raises(UnknownPrecision, match="'fp8', expected one of float32, bfloat16, int8"):
        check_precision("fp8")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_the_budget_holds_and_the_least_recently_used_goes(mixture: Mixture, precision: Precision) -> None:
    size = resident(mixture, 0, precision).level_bytes[1]
    modules = resident(mixture, 2 * size, precision)
    for module_id in ("1.0", "1.1", "1.0"):
        modules.get(1, module_id, mixture.digests[module_id])
    assert (modules.reads, modules.hits, modules.num_bytes) == (2, 1, 2 * size)
    modules.get(0, "0.0", mixture.digests["0.0"])  # larger than one of them
    assert modules.num_bytes <= 2 * size
    assert not modules.holds(mixture.digests["1.1"])


def test_a_module_beyond_the_budget_leaves_the_others(mixture: Mixture) -> None:
    size = min(resident(mixture, 0).level_bytes)
    assert size < max(resident(mixture, 0).level_bytes)
    modules = resident(mixture, size)
    modules.get(1, "1.0", mixture.digests["1.0"])
    for _ in range(2):
        modules.get(0, "0.0", mixture.digests["0.0"])
    assert (modules.reads, modules.num_bytes) == (3, size)
    assert modules.holds(mixture.digests["1.0"])


def test_float32_is_a_map_of_the_file_fused_without_a_copy(mixture: Mixture) -> None:
    module = resident(mixture, 1 << 30).get(1, "1.0", mixture.digests["1.0"])
    storages = set()
    for block in module.blocks.values():
        for weight in (block.queries_values, block.keys, block.out, block.gate_up, block.down):
            assert isinstance(weight, torch.Tensor)
            storages.add(weight.untyped_storage().data_ptr())
    assert len(storages) == 1


def test_absent_and_damaged_modules_are_refused_by_name(mixture: Mixture) -> None:
    modules = resident(mixture, 1 << 30)
    with pytest.raises(UnknownBlob, match="f" * 64):
        modules.get(0, "0.0", "f" * 64)
    file = mixture.store.path(mixture.digests["0.0"])
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedModule, match=r"module 0\.0 is damaged"):
        modules.get(0, "0.0", file.name)
