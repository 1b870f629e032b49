"""AdamW on the parameters of one path: which of them decay, and its state as tensors that another worker continues.

Decoupled weight decay acts on the matrices of the blocks and on the head, not on embeddings and norms.
State at rest: float32 tensors `m.<tensor>` and `v.<tensor>`; the number of steps taken stands in the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from configs.schema import InnerConfig
from model import tensor_file

EMBEDDING = "model.embed_tokens.weight"


class NonFiniteStep(ValueError):
    """An inner step whose loss or gradient is not finite; it was not taken."""


def decays(name: str, num_dimensions: int) -> bool:
    """Whether weight decay acts on a parameter."""
    return num_dimensions >= 2 and name != EMBEDDING


class InnerOptimizer:
    """Fused AdamW over named parameters, with gradient clipping and a rate set for each step."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], inner: InnerConfig) -> None:
        self._parameters = dict(parameters)
        self._all = list(self._parameters.values())
        self._clip_norm = inner.clip_norm
        decaying = [tensor for name, tensor in self._parameters.items() if decays(name, tensor.ndim)]
        others = [tensor for name, tensor in self._parameters.items() if not decays(name, tensor.ndim)]
        groups = [
            {"params": decaying, "weight_decay": inner.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=inner.learning_rate,
            betas=(inner.beta1, inner.beta2),
            eps=inner.eps,
            fused=True,
        )

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to the configured norm; returns the norm they had, on the device."""
        if self._clip_norm is None:
            return torch.nn.utils.get_total_norm([tensor.grad for tensor in self._all if tensor.grad is not None])
        return torch.nn.utils.clip_grad_norm_(self._all, self._clip_norm)

    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients at hand, and drop them."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def restore(self, path: Path, adam_step: int) -> None:
        """Continue from a state at rest after `adam_step` steps; raises TensorMismatch where it is another model's."""
        self.load(tensor_file.read(path, self._specs()), adam_step)

    def load(self, moments: Mapping[str, np.ndarray], adam_step: int) -> None:
        """Continue from arrays `m.<tensor>` and `v.<tensor>` after `adam_step` steps; they are copied."""
        for name, parameter in self._parameters.items():
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(adam_step), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.tensor(moments[f"m.{name}"], device=parameter.device),
                "exp_avg_sq": torch.tensor(moments[f"v.{name}"], device=parameter.device),
            }

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        """`m.<tensor>` and `v.<tensor>` in the order of their names: views where the state lies in main memory."""
        keys = {"m": "exp_avg", "v": "exp_avg_sq"}
        for name, _ in self._specs():
            moment, _, parameter = name.partition(".")
            yield name, self._adamw.state[self._parameters[parameter]][keys[moment]].detach().cpu().numpy()

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
