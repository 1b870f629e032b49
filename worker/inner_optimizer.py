"""The inner optimizer of one path: AdamW, or Muon with AdamW beside it, and its state as tensors that travel.

Which tensor is whose, and what the state holds of it, stands in model/inner_state.py. State at rest: float32 tensors
`m.<tensor>` and, of AdamW, `v.<tensor>`; the number of steps taken stands in the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from configs.schema import InnerConfig
from model import tensor_file
from model.inner_state import takes_muon
from worker.adamw import AdamW
from worker.muon import Muon


class NonFiniteStep(ValueError):
    """An inner step whose loss or gradient is not finite; it was not taken."""


class InnerOptimizer:
    """Steps named parameters, with gradient clipping and a rate set for each step."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], inner: InnerConfig) -> None:
        self._parameters = dict(parameters)
        self._inner = inner
        matrices = {n: tensor for n, tensor in self._parameters.items() if takes_muon(inner, n, tensor.ndim)}
        self._adamw = AdamW({n: tensor for n, tensor in self._parameters.items() if n not in matrices}, inner)
        self._muon = Muon(matrices, inner)
        m, v = self._adamw.m | self._muon.m, self._adamw.v
        state = {f"m.{name}": tensor for name, tensor in m.items()} | {f"v.{name}": v[name] for name in v}
        self._state = dict(sorted(state.items()))

    @property
    def specs(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the state, in the order of its bytes."""
        return [(name, tuple(tensor.shape)) for name, tensor in self._state.items()]

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._state.values())

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to the configured norm; returns the norm they had, on the device."""
        tensors = list(self._parameters.values())
        if self._inner.clip_norm is None:
            return torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        return torch.nn.utils.clip_grad_norm_(tensors, self._inner.clip_norm)

    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients at hand, and drop them."""
        self._muon.step(learning_rate)
        self._adamw.step(learning_rate)
        for parameter in self._parameters.values():
            parameter.grad = None

    def restore(self, path: Path, adam_step: int) -> None:
        """Continue from a state at rest after `adam_step` steps; raises TensorMismatch where it is another model's."""
        self.load(tensor_file.read(path, self.specs), adam_step)

    def load(self, moments: Mapping[str, np.ndarray], adam_step: int) -> None:
        """Continue from arrays by the names of `specs` after `adam_step` steps; they are copied."""
        self._adamw.continue_after(adam_step)
        for name, tensor in self._state.items():
            tensor.copy_(torch.from_numpy(moments[name]))

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        """The state by the names of `specs`, in their order: views where it lies in main memory."""
        for name, tensor in self._state.items():
            yield name, tensor.cpu().numpy()

    def save(self, path: Path) -> tuple[str, int]:
        """Write the state durably; returns (SHA-256 hex, size in bytes)."""
        with tensor_file.Writer(path, self.specs) as writer:
            for _, values in self.moments():
                writer.append(values)
            return writer.finish()
