"""Cross-entropy of a linear head, a chunk of tokens at a time, with its gradients taken on the way.

The logits of a whole batch never exist (as in Liger Kernel, 2410.10989): memory is bounded by the chunk, and on a CPU
the chunk stays in its cache. Under autocast the matrix products run in its dtype, the loss in float32.

Legend: N tokens counted, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = {"cpu": 2**18}  # 1 MiB of logits: within the second-level cache
_CHUNK_ELEMENTS_ELSEWHERE = 2**27


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens whose logits are held at once."""
    return max(16, _CHUNK_ELEMENTS.get(device_type, _CHUNK_ELEMENTS_ELSEWHERE) // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass keeps the gradients instead of what they are made of."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        size = chunk_tokens(weight.shape[0], hidden.device.type)
        total = torch.zeros((), device=hidden.device)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        for start in range(0, hidden.shape[0], size):
            part, target = hidden[start : start + size], targets[start : start + size, None]
            scores = torch.log_softmax((part @ weight.t()).float(), dim=-1)  # (C, V)
            at_target = scores.gather(1, target)
            total -= at_target.sum()
            if wants_hidden or wants_weight:
                error = scores.exp_().scatter_(1, target, at_target.exp() - 1.0)  # softmax minus one-hot
            if hidden_grad is not None:
                hidden_grad[start : start + size] = error @ weight
            if weight_grad is not None:
                weight_grad += error.t() @ part
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * scale,
            None if weight_grad is None else weight_grad * scale,
            None,
        )


def linear_cross_entropy(
    hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], targets: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Sum over the tokens of -log softmax(hidden @ weight.T)[target], in nats, float32; differentiable once."""
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return total


def token_cross_entropy(
    hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], targets: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The same for each token by itself, without gradients: for evaluation."""
    size = chunk_tokens(weight.shape[0], hidden.device.type)
    with torch.no_grad():
        losses = [
            F.cross_entropy((part @ weight.t()).float(), target, reduction="none")
            for part, target in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        ]
    return torch.cat(losses)
