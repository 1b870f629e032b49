"""Muon on the matrices of the blocks: momentum made orthogonal by Newton-Schulz (in DiLoCo: MuLoCo, 2505.23725).

Momentum in its Nesterov form, iteration and coefficients are those of Keller Jordan's Muon (github KellerJordan/Muon).
An update is scaled by 0.2 sqrt(max(R, C)) (Moonlight, 2502.16982, Sec 2.2), not by sqrt(max(1, R / C)): an orthogonal
R x C matrix has elements of root mean square 1 / sqrt(max(R, C)), and so each step moves a matrix by the learning rate
times 0.2, as far as AdamW's steps do. One learning rate, its schedule and its weight decay then serve the matrices and
what AdamW steps beside them, and those found with AdamW carry over.
The iteration runs in float32, as master weights do, whatever the dtype of the task: it is a small part of a step.

Legend: R rows, C columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from configs.schema import InnerConfig

# Of x -> a x + b (x x') x + c (x x')^2 x, chosen for the steepest slope at 0 that ends near 1 everywhere on [0, 1].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Root mean square of an update's elements in units of the learning rate: what AdamW's updates have.
UPDATE_RMS = 0.2
_EPS = 1e-7


def orthogonalized(update: Float[Tensor, "R C"], steps: int) -> Float[Tensor, "R C"]:
    """About U V', where `update` is U S V': five steps bring S to 0.7..1.2, but for what is far below its norm."""
    a, b, c = COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update  # the products are those of the shorter side
    x = x / (torch.linalg.vector_norm(x) + _EPS)  # the spectral norm is at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon:
    """Muon over named matrices, its state in `m` by their names: the mean of the gradients, as AdamW's `m` is."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], inner: InnerConfig) -> None:
        self._parameters = dict(parameters)
        self._muon, self._weight_decay = inner.muon, inner.weight_decay
        self._rate_ratio = (inner.muon.learning_rate or inner.learning_rate) / inner.learning_rate
        self.m = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients at hand; `learning_rate` is that of the other tensors."""
        rate = learning_rate * self._rate_ratio
        momentum = self._muon.momentum
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            self.m[name].lerp_(parameter.grad, 1.0 - momentum)
            ahead = torch.lerp(parameter.grad, self.m[name], momentum)  # Nesterov: the mean with the gradient once more
            update = orthogonalized(ahead, self._muon.newton_schulz_steps)
            parameter.mul_(1.0 - rate * self._weight_decay)
            parameter.add_(update, alpha=-rate * UPDATE_RMS * math.sqrt(max(parameter.shape)))
