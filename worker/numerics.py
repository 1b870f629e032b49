"""The numerics a task asks for, made true in this process: device, dtype, threads, deterministic kernels, autocast.

Numerics belong to the task: nothing here looks at how much memory or how many cores happen to be free.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from protocol.tasks import Numerics


class UnsupportedNumerics(ValueError):
    """Numerics that this machine cannot honour."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Numerics with nothing left open. Master weights are float32 whatever `dtype` says."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    checkpoint_activations: bool

    def autocast(self) -> AbstractContextManager[object]:
        """The context of every forward pass: bfloat16 matrix products, or nothing at all."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def resolve(numerics: Numerics) -> Compute:
    """Choose the device and dtype that `auto` leaves open; raises UnsupportedNumerics.

    auto device: cuda, else mps, else cpu. auto dtype: bfloat16 on a cuda device that computes in it, else float32.
    """
    name = _auto_device() if numerics.device == "auto" else numerics.device
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise UnsupportedNumerics(
            f"the task asks for numerics.device {name!r}, and torch {torch.__version__} finds none on this machine"
        )
    bfloat16 = numerics.dtype == "bfloat16"
    if numerics.dtype == "auto":
        bfloat16 = name == "cuda" and torch.cuda.is_bf16_supported()
    return Compute(
        device=torch.device(name),
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        compile=numerics.compile,
        checkpoint_activations=numerics.checkpoint_activations,
    )


@contextlib.contextmanager
def applied(numerics: Numerics) -> Iterator[Compute]:
    """Run a task under its numerics: threads and deterministic kernels, put back afterwards."""
    # cuBLAS reads this when the device is first used; without it products on CUDA may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    compute = resolve(numerics)
    threads, before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(numerics.threads)
    # The same as use_deterministic_algorithms, which would import the compiler to tell it, too.
    torch.set_deterministic_debug_mode("error")
    if numerics.compile:
        torch.use_deterministic_algorithms(True)
    # Filling fresh memory with NaN finds reads of it; ours is written before it is read, and the filling costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield compute
    finally:
        if numerics.compile:
            torch.use_deterministic_algorithms(False)
        torch.set_deterministic_debug_mode(before)
        torch.set_num_threads(threads)


def _auto_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
