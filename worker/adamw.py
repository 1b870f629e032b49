"""AdamW on named parameters: decoupled weight decay (1711.05101) on the matrices of the blocks and on the head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim.adamw import adamw

from configs.schema import InnerConfig
from model.inner_state import EMBEDDING


def decays(name: str, num_dimensions: int) -> bool:
    """Whether weight decay acts on a parameter: not on embeddings and norms."""
    return num_dimensions >= 2 and name != EMBEDDING


class AdamW:
    """Fused AdamW, its state in `m` and `v` by the names of the parameters.

    By torch's functional form: its optimizer class would import the compiler, most of a second of a worker's start.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], inner: InnerConfig) -> None:
        self._parameters = dict(parameters)
        self._inner = inner
        self.m = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        self.v = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        self.continue_after(0)
        self._groups: list[tuple[float, list[str]]] = [
            (inner.weight_decay, [name for name, tensor in self._parameters.items() if decays(name, tensor.ndim)]),
            (0.0, [name for name, tensor in self._parameters.items() if not decays(name, tensor.ndim)]),
        ]

    def continue_after(self, steps: int) -> None:
        """The state is that after so many steps: what the bias correction counts."""
        self._steps = {name: _step_tensor(steps, tensor) for name, tensor in self._parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients at hand."""
        for weight_decay, names in self._groups:
            present = {name: grad for name in names if (grad := self._parameters[name].grad) is not None}
            adamw(
                [self._parameters[name] for name in present],
                list(present.values()),
                [self.m[name] for name in present],
                [self.v[name] for name in present],
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


def _step_tensor(steps: int, parameter: torch.Tensor) -> torch.Tensor:
    """How many steps a parameter has taken, in the form that the fused kernel counts."""
    return torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
