"""Weights in the precision they are served in, and products with them.

float32 is used as it lies in the module's file. bfloat16 and int8 multiply in bfloat16; int8 keeps one scale an output
(symmetric, the largest weight of the row at 127). Norms and the residual stream stay float32. The choice between
torch's kernels is by measurement on CPUs: for few rows a matrix is read at the speed of memory by one of them only.

Legend: N rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

Precision = Literal["float32", "bfloat16", "int8"]

# Rows from which `weight @ x.T` beats `x @ weight.T` in float32 on a CPU.
_FLOAT_TRANSPOSED_ROWS = 7
# Rows from which it pays to widen an int8 matrix before the product.
_INT8_WIDENED_ROWS = 24
_INT8_TILE = 16
_INT8_MAX = 127.0


class UnknownPrecision(ValueError):
    """A precision that weights are not served in."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A matrix as `values * scales`, one scale a row."""

    values: Int[Tensor, "O I"]
    scales: Float[Tensor, " O"]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


Weight = Tensor | Int8Weight


def check_precision(name: str) -> Precision:
    """The precision of that name; raises UnknownPrecision."""
    for known in get_args(Precision):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise UnknownPrecision(f"precision is {name!r}, expected one of {', '.join(get_args(Precision))}")


def compute_dtype(precision: Precision) -> torch.dtype:
    """What products are taken in, and keys and values kept in."""
    return torch.float32 if precision == "float32" else torch.bfloat16


def matrix_bytes(precision: Precision, outputs: int, inputs: int) -> int:
    """Bytes of a matrix in that precision."""
    if precision == "int8":
        return outputs * inputs + 2 * outputs
    return outputs * inputs * (4 if precision == "float32" else 2)


def lower(weight: Float[Tensor, "O I"], precision: Precision) -> Weight:
    """The matrix in that precision; float32 is not copied."""
    if precision == "float32":
        return weight
    if precision == "bfloat16":
        return weight.to(torch.bfloat16)
    scales = (weight.abs().amax(dim=1) / _INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    values = (weight / scales.float()[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return Int8Weight(values, scales)


def rows_of(weight: Weight, rows: Int[Tensor, " N"]) -> Float[Tensor, "N I"]:
    """Some rows in float32: embedding."""
    if isinstance(weight, Int8Weight):
        return weight.values[rows].float() * weight.scales[rows].float()[:, None]
    return F.embedding(rows, weight).float()


def project(x: Float[Tensor, "N I"], weight: Weight) -> Float[Tensor, "N O"]:
    """x @ weight.T, in the dtype that products are taken in."""
    if isinstance(weight, Int8Weight):
        return _project_int8(x, weight)
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    if not x.is_cpu:
        return F.linear(x, weight)
    if weight.dtype == torch.bfloat16:
        return _project_bfloat16(x, weight)
    if x.shape[0] < _FLOAT_TRANSPOSED_ROWS:
        return F.linear(x, weight)
    return torch.mm(weight, x.t()).t().contiguous()


def _project_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    """A lone row is doubled: for one the kernel is a slow product with a vector, for two it reads at full speed."""
    if x.shape[0] == 1:
        return torch.mm(weight, x.expand(2, -1).t())[:, :1].t().contiguous()
    return torch.mm(weight, x.t()).t().contiguous()


def _project_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    x = x.to(torch.bfloat16)
    narrow = x.is_cpu and x.shape[0] < _INT8_WIDENED_ROWS
    if narrow and not (weight.values.shape[0] % _INT8_TILE or weight.values.shape[1] % _INT8_TILE):
        return torch._weight_int8pack_mm(x, weight.values, weight.scales)
    return project(x, weight.values.to(torch.bfloat16)) * weight.scales
