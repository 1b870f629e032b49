"""Root mean square norm (1910.07467) with a gain, in float32.

On a CPU the derivative that torch composes of elementary operations costs eight passes over memory; the closed form
below costs four. Elsewhere torch's own kernel is used.

Legend: N vectors, H their size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (x * inverse).mul_(weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With y = x * r * w and r = (mean(x^2) + eps)^(-1/2): dx = r * w * g - x * r^3 * sum(g * x * w) / H."""
        x, weight, inverse = ctx.saved_tensors
        size = x.shape[-1]
        product = (grad * x).reshape(-1, size)  # (N, H)
        weight_grad = torch.mv(product.t(), inverse.view(-1))
        share = torch.mv(product, weight).view_as(inverse).mul_(inverse.pow(3)).div_(size)
        x_grad = (grad * weight).mul_(inverse).addcmul_(x, share, value=-1.0)
        return x_grad, weight_grad, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... H"]) -> Float[Tensor, "... H"]:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            out: Tensor = _RMSNorm.apply(x.float().contiguous(), self.weight, self.eps)  # type: ignore[no-untyped-call]
            return out
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
