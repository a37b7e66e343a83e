"""Tokens to their experts and back: two permutations, each the other's gradient, in an order that never changes.

t tokens, each taken by k experts: t k rows, sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losia_dist.subnet.experts_function import Routing


class Dispatch:
    """The order of one call's tokens.

    Args:
        experts: int64 [t, k], the experts that each token was sent to; numbers from `count` on name none.
        count: E.
        has_nobodys: whether there may be such (experts are spread over ranks, and others' tokens come too).
    """

    def __init__(self, experts: Tensor, count: int, has_nobodys: bool) -> None:
        flat = experts.reshape(-1)
        if not has_nobodys:
            flat = flat.clamp(max=count - 1)
        owners, self.order = torch.sort(flat, stable=True)
        self.back = torch.empty_like(self.order)
        self.back[self.order] = torch.arange(self.order.numel(), device=self.order.device)
        self.k = experts.shape[-1]
        # Where the tokens of each expert end, without a count that the host would wait for.
        ends = torch.searchsorted(owners, torch.arange(count, device=owners.device), right=True)
        nobodys = (owners >= count).unsqueeze(-1) if has_nobodys else None
        self.routing = Routing(ends.to(torch.int32), owners.clamp(max=count - 1) if has_nobodys else owners, nobodys)

    def scatter(self, tokens: Tensor) -> Tensor:
        """[t, n] -> [t k, n], sorted by expert."""
        return _Scatter.apply(tokens, self.order, self.back, self.k)  # type: ignore[no-any-return]

    def gather(self, rows: Tensor) -> Tensor:
        """[t k, n], sorted by expert -> the sum over each token's experts, [t, n]."""
        return _Gather.apply(rows, self.order, self.back, self.k)  # type: ignore[no-any-return]


def _scatter(tokens: Tensor, order: Tensor, k: int) -> Tensor:
    return tokens.index_select(0, order // k)


def _gather(rows: Tensor, back: Tensor, k: int) -> Tensor:
    return rows.index_select(0, back).view(-1, k, rows.shape[-1]).sum(1)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return _scatter(tokens, order, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, ctx.saved_tensors[0], ctx.k), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _gather(rows, back, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(grad, ctx.saved_tensors[0], ctx.k), None, None, None
