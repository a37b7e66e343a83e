"""`PackedLinear`: a linear layer over a quantized weight that this library reads. Frozen, until it gets a subnet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from losia_dist.subnet.autocast import autocast_dtype
from losia_dist.subnet.packed import PackedWeight


class PackedLinear(nn.Linear):
    """y = x W^T + b, with W [m, n] made dense for the time of the product, and again for dx. W gets no gradient."""

    packed_weights: dict[str, PackedWeight]
    compute: Any

    @property
    def packed(self) -> PackedWeight:
        """What its weight stores."""
        return self.packed_weights["weight"]

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = autocast_dtype(device, True)
        if dtype is None:
            return self.compute(input, self)
        with torch.autocast(device, enabled=False):
            return self.compute(input.to(dtype), self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.packed.kind}"


class _FrozenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.codes, ctx.packed = codes, packed  # references: a sharded engine empties the tensor, and fills it again
        return functional.linear(x, packed.dense(codes, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_y @ ctx.packed.dense(ctx.codes, grad_y.dtype) if needs_x else None
        return grad_x, None, grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if needs_bias else None, None


def compute_frozen(x: Tensor, layer: PackedLinear) -> Tensor:
    """y of a layer without a subnet: x [..., n] -> [..., m]."""
    return _FrozenFunction.apply(x, layer.weight, layer.bias, layer.packed)  # type: ignore[no-any-return]
