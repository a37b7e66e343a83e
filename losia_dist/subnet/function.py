"""The forward and backward of a linear layer of which only a subnet trains (LoSiA-Pro, paper section 3.4).

Dimensions in names: m output neurons, n input neurons, r and c rows and columns of the subnet.

The subnet's values are written into the frozen weight, where the engine has it whole anyway; y = x W^T and dx = dy W then
run as one dense matmul each, so the step sits at the FLOP floor. Only x[..., C] is kept for backward.

`subnet_forward` and `subnet_backward` compute; the autograd Function here calls them in eager mode, and
`losia_dist.subnet.operator` under torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from losia_dist.subnet.blocks import subnet_gradient, take_subnet, write_subnet
from losia_dist.subnet.capture import refuse_capture
from losia_dist.subnet.float8 import float8_input_gradient, float8_linear
from losia_dist.subnet.site import GradientSink, Site


def subnet_forward(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, subnet: Tensor) -> Tensor:
    """y = x W^T + b with the subnet's present values in W; x [..., n] -> [..., m], in the dtype of x."""
    refuse_capture(site.name, x)
    if site.input_sink is not None:
        site.input_sink(x, 0)
    matrix = site.present(weight, subnet, x.dtype, again=False)
    if site.in_float8:
        return float8_linear(x, matrix, bias)
    return functional.linear(x, matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))


def subnet_backward(
    site: Site,
    grad_y: Tensor,
    kept: Tensor,
    weight: Tensor,
    subnet: Tensor,
    sink: GradientSink | None,
    *,
    needs_x: bool,
    needs_subnet: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., n] and dS [r, c] (in the subnet's dtype), each None where it is not needed.

    kept: all of x [..., n] if there is a sink to take the full gradient (the layer localizes), else x[..., C].
    """
    refuse_capture(site.name, grad_y)
    grad_x = grad_subnet = matrix = None
    # dx reads the weight, and so does the sink, which another rank may have (reduction="by_rank").
    if needs_x or sink is not None or (site.packed is not None and site.packed.needs_all_ranks):
        matrix = site.present(weight, subnet, grad_y.dtype, again=True)
    if needs_x:
        assert matrix is not None
        grad_x = float8_input_gradient(grad_y, matrix) if site.in_float8 else grad_y @ matrix.to(grad_y.dtype)
    if needs_subnet:
        flat_grad, flat_kept = grad_y.reshape(-1, grad_y.shape[-1]), kept.reshape(-1, kept.shape[-1])
        if sink is None:
            grad_subnet = subnet_gradient(flat_grad, flat_kept, site.rows)
        else:
            assert matrix is not None
            grad_subnet = _give_up(flat_grad.t() @ flat_kept, site, matrix, sink)
        grad_subnet = grad_subnet.to(subnet.dtype)
        site.in_mid_step = True
        if site.gradient_witness is not None:
            site.gradient_witness(grad_subnet)
    return grad_x, grad_subnet


def _give_up(full: Tensor, site: Site, matrix: Tensor, sink: GradientSink) -> Tensor:
    """The subnet's part of a full gradient [m, n], which the sink then keeps and uses up."""
    grad_subnet = take_subnet(full, site.rows, site.columns)
    sink(full.clone() if grad_subnet is full else full, matrix)
    return grad_subnet


class SubnetLinearFunction(torch.autograd.Function):
    """y = x W^T + b with gradients for x, the subnet and (if it trains) the bias; none for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, subnet: Tensor, site: Site) -> Tensor:
        ctx.sink = site.gradient_sink
        # Localizing needs the full gradient, hence all of x; everyone else keeps the subnet's columns alone.
        ctx.save_for_backward(x if ctx.sink is not None else site.columns_of(x))
        # References, not saved tensors: a sharded engine empties the weight after forward and gathers it again before
        # backward under the same object.
        ctx.weight, ctx.subnet, ctx.site = weight, subnet, site
        ctx.has_bias = bias is not None
        y = subnet_forward(site, x, weight, bias, subnet)
        # A view that leaves a Function may not be changed in place, as some models do with what a linear layer gives.
        return y.data if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        needs_x, _, needs_bias, needs_subnet, _ = ctx.needs_input_grad
        grad_x, grad_subnet = subnet_backward(
            ctx.site, grad_y, kept, ctx.weight, ctx.subnet, ctx.sink, needs_x=needs_x, needs_subnet=needs_subnet
        )
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.has_bias and needs_bias else None
        return grad_x, None, grad_bias, grad_subnet, None


def embedding_forward(head: Site, tokens: Tensor, weight: Tensor, subnet: Tensor) -> Tensor:
    """Rows of a weight that the output layer shares, with its subnet's present values: int64 [...] -> [..., n]."""
    refuse_capture(head.name, tokens)
    if head.must_write(weight, subnet):
        write_subnet(weight, subnet, head.rows, head.columns)
    return functional.embedding(tokens, weight)


def embedding_backward(
    head: Site,
    grad_y: Tensor,
    tokens: Tensor,
    weight: Tensor,
    subnet: Tensor,
    sink: GradientSink | None,
    padding_index: int | None,
) -> Tensor:
    """dS [r, n] of the look-up, in the subnet's dtype; tokens equal to padding_index give none."""
    refuse_capture(head.name, grad_y)
    flat_tokens = tokens.reshape(-1)
    flat_grad = grad_y.reshape(-1, grad_y.shape[-1])
    if padding_index is not None:
        flat_grad = flat_grad * (flat_tokens != padding_index).unsqueeze(1)
    if sink is not None:
        if not head.weight_is_resident:
            write_subnet(weight, subnet, head.rows, head.columns)  # the sink reads the weight
        full = flat_grad.new_zeros(weight.shape).index_add_(0, flat_tokens, flat_grad)
        grad_subnet = _give_up(full, head, weight, sink)
    elif head.rows is None:
        grad_subnet = flat_grad.new_zeros(subnet.shape).index_add_(0, flat_tokens, flat_grad)
    else:
        # Position of each token among the sorted subnet rows; tokens outside contribute zeros (no host sync).
        position = torch.searchsorted(head.rows, flat_tokens).clamp_(max=head.rows.numel() - 1)
        inside = (head.rows[position] == flat_tokens).unsqueeze(1)
        grad_subnet = flat_grad.new_zeros(subnet.shape).index_add_(0, position, flat_grad * inside)
    return grad_subnet.to(subnet.dtype)


class TiedEmbeddingFunction(torch.autograd.Function):
    """Token look-up in a weight that the output layer shares: its gradient belongs to the same subnet rows."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, subnet: Tensor, head: Site, padding_index: int | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.subnet, ctx.head, ctx.padding_index, ctx.sink = weight, subnet, head, padding_index, head.gradient_sink
        return embedding_forward(head, tokens, weight, subnet)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        grad_subnet = embedding_backward(ctx.head, grad_y, tokens, ctx.weight, ctx.subnet, ctx.sink, ctx.padding_index)
        return None, None, grad_subnet, None, None
