"""Products with a layer's whole weight in FP8, written from docs/algorithm.md: rounded values in fp32, then plain products.

It imports nothing of the package, and rounds by arithmetic instead of by torch's FP8 types.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

E4M3 = (448.0, 3, -6)  # largest value, bits behind the point, exponent of the smallest normal number
E5M2 = (57344.0, 2, -14)


def rounded(values: Tensor, form: tuple[float, int, int]) -> Tensor:
    """round(2^k A) 2^-k in fp32, ties to even."""
    largest_of_form, bits, lowest = form
    largest = values.abs().max().item()
    if not math.isfinite(largest):
        return torch.full_like(values, math.nan)
    if largest == 0:
        return values.float()
    k = max(-126, min(126, math.floor(math.log2(largest_of_form / largest))))
    scaled = values.double() * 2.0**k
    exponent = torch.log2(scaled.abs().clamp(min=2.0**lowest)).floor()
    spacing = torch.exp2(exponent - bits)
    return (torch.round(scaled / spacing) * spacing * 2.0**-k).float()


class _Products(torch.autograd.Function):
    """y = q(x) q(W)^T + b; dx = q(dy) q(W); gradients of W and b from dy and x as they are. W [m, n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = rounded(x, E4M3) @ rounded(weight, E4M3).t()
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = rounded(grad_y, E5M2) @ rounded(weight, E4M3)
        return grad_x, flat.t() @ x.reshape(-1, x.shape[-1]), flat.sum(0) if ctx.has_bias else None


def compute_in_float8(model: nn.Module, weights: Collection[str], transposed: Collection[str] = ()) -> list[str]:
    """Let those layers of a plain model compute so whose sizes allow it, in place; returns the names of their weights.

    weights: names of target layers' weights, the output layer's left out. transposed: those that are stored as [n, m].
    """
    found = []
    for name in weights:
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        if any(size % 16 for size in module.weight.shape):
            continue
        module.forward = _forward_of(module, name in transposed)
        found.append(name)
    return found


def _forward_of(module: Any, is_transposed: bool) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight = module.weight.t() if is_transposed else module.weight
        return _Products.apply(x, weight, module.bias)

    return forward
