"""Importance of one weight element and its running averages (paper section 3.2; docs/algorithm.md)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def importance_(gradient: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Overwrite the gradient [b, n] fp32 with I, and return it; weight [b, n] before the update, any floating dtype.

    "param_mix": |w g - (w g)^2 / 2|; "first_order": |w g|; "second_order": (w g)^2. Any one shape will do; no temporary.
    """
    product = gradient.mul_(weight)
    if kind == "param_mix":
        return product.addcmul_(product, product, value=-0.5).abs_()
    return product.abs_() if kind == "first_order" else product.square_()


@torch.no_grad()
def has_signal(gradient: Tensor) -> Tensor:
    """Whether any entry is not zero: bool [], on the gradient's device. NaN counts as one."""
    if gradient.device.type == "cpu":
        return torch.count_nonzero(gradient) > 0  # eight times as fast there; elsewhere it makes a copy
    return gradient.any()


@torch.no_grad()
def update_averages_(
    mean: Tensor, deviation: Tensor, importance: Tensor, betas: tuple[float, float], signal: Tensor | None = None
) -> None:
    """Ibar <- b1 Ibar + (1 - b1) I;  Ubar <- b2 Ubar + (1 - b2) |I - Ibar|, with the Ibar just updated.

    All fp32 and of one shape; `importance` is used up (it holds |I - Ibar| afterwards).

    signal: bool [], or [b, 1] for each row, whether the gradient of the row's matrix was other than zero; where it was not, I
        is 0 and both averages stay. None: it was.
    """
    first, second = betas
    if signal is None:
        signal = torch.ones((), dtype=torch.bool, device=mean.device)
    seen = signal.to(mean.device, torch.float32)
    mean.mul_(1 - (1 - first) * seen).add_(importance, alpha=1 - first)
    # The condition is a number on the device: the host does not wait for it.
    deviation.mul_(1 - (1 - second) * seen).addcmul_(importance.sub_(mean).abs_(), (1 - second) * seen)


@torch.no_grad()
def fold_importance_(
    gradient: Tensor,
    weight: Tensor,
    mean: Tensor,
    deviation: Tensor,
    *,
    kind: str,
    betas: tuple[float, float],
    signal: Tensor | None = None,
) -> None:
    """Take I from the gradient of one step and move both averages, a band of rows at a time.

    signal: as for `update_averages_`. All else [b, n]; gradient (used up where it is fp32) and weight of any floating dtype,
    averages fp32. On the CPU a band stays in the cache through all of the arithmetic, which is else bound by memory; on a
    device it bounds the fp32 copy of a bf16 gradient.
    """
    elements = 1 << 17 if gradient.device.type == "cpu" else 1 << 26
    band = max(1, elements // max(1, gradient.shape[1]))
    by_row = signal is not None and signal.dim() > 0
    for start in range(0, gradient.shape[0], band):
        rows = slice(start, start + band)
        seen = signal[rows] if signal is not None and by_row else signal
        moved = importance_(gradient[rows].to(torch.float32), weight[rows], kind)
        update_averages_(mean[rows], deviation[rows], moved, betas, seen)
