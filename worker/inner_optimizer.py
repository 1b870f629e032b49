"""AdamW on the parameters of one path: which of them decay, and its state as tensors that another worker continues.

Decoupled weight decay acts on the matrices of the blocks and on the head, not on embeddings and norms.
State at rest: float32 tensors `m.<tensor>` and `v.<tensor>`; the number of steps taken stands in the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.optim.adamw import adamw

from configs.schema import InnerConfig
from model import tensor_file

EMBEDDING = "model.embed_tokens.weight"


class NonFiniteStep(ValueError):
    """An inner step whose loss or gradient is not finite; it was not taken."""


def decays(name: str, num_dimensions: int) -> bool:
    """Whether weight decay acts on a parameter."""
    return num_dimensions >= 2 and name != EMBEDDING


class InnerOptimizer:
    """Fused AdamW over named parameters, with gradient clipping and a rate set for each step.

    By torch's functional form: its optimizer class would import the compiler, most of a second of a worker's start.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], inner: InnerConfig) -> None:
        self._parameters = dict(parameters)
        self._inner = inner
        self._moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in self._parameters.items()}
        self._steps = {name: _step_tensor(0, tensor) for name, tensor in self._parameters.items()}
        self._groups: list[tuple[float, list[str]]] = [
            (inner.weight_decay, [name for name, tensor in self._parameters.items() if decays(name, tensor.ndim)]),
            (0.0, [name for name, tensor in self._parameters.items() if not decays(name, tensor.ndim)]),
        ]

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to the configured norm; returns the norm they had, on the device."""
        tensors = list(self._parameters.values())
        if self._inner.clip_norm is None:
            return torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        return torch.nn.utils.clip_grad_norm_(tensors, self._inner.clip_norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients at hand, and drop them."""
        for weight_decay, names in self._groups:
            present = {name: grad for name in names if (grad := self._parameters[name].grad) is not None}
            adamw(
                [self._parameters[name] for name in present],
                list(present.values()),
                [self._moments[name][0] for name in present],
                [self._moments[name][1] for name in present],
                [],
                [self._steps[name] for name in present],
                fused=True,
                amsgrad=False,
                beta1=self._inner.beta1,
                beta2=self._inner.beta2,
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=self._inner.eps,
                maximize=False,
            )
        for parameter in self._parameters.values():
            parameter.grad = None

    def restore(self, path: Path, adam_step: int) -> None:
        """Continue from a state at rest after `adam_step` steps; raises TensorMismatch where it is another model's."""
        self.load(tensor_file.read(path, self._specs()), adam_step)

    def load(self, moments: Mapping[str, np.ndarray], adam_step: int) -> None:
        """Continue from arrays `m.<tensor>` and `v.<tensor>` after `adam_step` steps; they are copied."""
        for name, parameter in self._parameters.items():
            self._steps[name] = _step_tensor(adam_step, parameter)
            for tensor, moment in zip(self._moments[name], "mv", strict=True):
                tensor.copy_(torch.from_numpy(moments[f"{moment}.{name}"]))

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        """`m.<tensor>` and `v.<tensor>` in the order of their names: views where the state lies in main memory."""
        for name, _ in self._specs():
            moment, _, parameter = name.partition(".")
            yield name, self._moments[parameter]["mv".index(moment)].cpu().numpy()

    def save(self, path: Path) -> tuple[str, int]:
        """Write the state durably; returns (SHA-256 hex, size in bytes)."""
        with tensor_file.Writer(path, self._specs()) as writer:
            for _, values in self.moments():
                writer.append(values)
            return writer.finish()

    def _specs(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the state, in the order of its bytes."""
        shapes = [(name, tuple(tensor.shape)) for name, tensor in sorted(self._parameters.items())]
        return [(f"{moment}.{name}", shape) for moment in "mv" for name, shape in shapes]


def _step_tensor(steps: int, parameter: torch.Tensor) -> torch.Tensor:
    """How many steps a parameter has taken, in the form that the fused kernel counts."""
    return torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
