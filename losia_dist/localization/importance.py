"""Importance of one weight element and its running averages (paper section 3.2; docs/algorithm.md)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def importance_(gradient: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Overwrite the gradient (fp32, any shape) with I, given the weight before the update (any floating dtype).

    "param_mix": |w g - (w g)^2 / 2|; "first_order": |w g|; "second_order": (w g)^2. No temporary is made.
    """
    product = gradient.mul_(weight)
    if kind == "param_mix":
        return product.addcmul_(product, product, value=-0.5).abs_()
    return product.abs_() if kind == "first_order" else product.square_()


@torch.no_grad()
def update_averages_(mean: Tensor, deviation: Tensor, importance: Tensor, betas: tuple[float, float]) -> None:
    """Ibar <- b1 Ibar + (1 - b1) I;  Ubar <- b2 Ubar + (1 - b2) |I - Ibar|, with the Ibar just updated.

    All fp32 and of one shape; `importance` is used up (it holds |I - Ibar| afterwards).
    """
    first, second = betas
    mean.mul_(first).add_(importance, alpha=1 - first)
    deviation.mul_(second).add_(importance.sub_(mean).abs_(), alpha=1 - second)


@torch.no_grad()
def fold_importance_(
    gradient: Tensor, weight: Tensor, mean: Tensor, deviation: Tensor, *, kind: str, betas: tuple[float, float]
) -> None:
    """Take I from the gradient of one step and move both averages, a band of rows at a time.

    All [b, n]; gradient (used up where it is fp32) and weight of any floating dtype, averages fp32. On the CPU a band
    stays in the cache through all of the arithmetic, which is else bound by memory; on a device it bounds the fp32 copy of a
    bf16 gradient.
    """
    elements = 1 << 17 if gradient.device.type == "cpu" else 1 << 26
    band = max(1, elements // max(1, gradient.shape[1]))
    for g, w, one, other in zip(*(tensor.split(band) for tensor in (gradient, weight, mean, deviation)), strict=True):
        update_averages_(one, other, importance_(g.to(torch.float32), w, kind), betas)
