"""Numerics of a task hold while it runs and not after."""

from __future__ import annotations

import pytest
import torch

from protocol.tasks import Numerics
from worker.numerics import UnsupportedNumerics, applied, resolve


def test_threads_and_determinism_hold_inside_only() -> None:
    torch.set_num_threads(1)
    with applied(Numerics(device="cpu", threads=2)) as compute:
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
        assert compute.device == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_auto_on_a_processor_is_float32() -> None:
    assert resolve(Numerics(device="cpu")).dtype == torch.float32
    assert resolve(Numerics(device="cpu", dtype="bfloat16")).dtype == torch.bfloat16


def test_autocast_follows_the_dtype() -> None:
    weight = torch.ones(4, 4)
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with resolve(Numerics.model_validate({"device": "cpu", "dtype": dtype})).autocast():
            assert (weight @ weight).dtype == expected


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_missing_is_named(device: str) -> None:
    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        pytest.skip("this machine has one")
    with pytest.raises(UnsupportedNumerics, match=f"numerics.device '{device}'"):
        resolve(Numerics.model_validate({"device": device}))
