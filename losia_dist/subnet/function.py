"""The forward and backward of a linear layer of which only a subnet trains (LoSiA-Pro, paper section 3.4).

Dimensions in names: m output neurons, n input neurons, r and c rows and columns of the subnet.

The subnet's values are written into the frozen weight, where the engine has it whole anyway; y = x W^T and dx = dy W then
run as one dense matmul each, so the step sits at the FLOP floor. Only x[..., C] is kept for backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from losia_dist.subnet.linear import SubnetLinear


@torch.no_grad()
def write_subnet(weight: Tensor, subnet: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """weight[R][:, C] = subnet, in place and unseen by autograd.

    weight [m, n] whole (a transposed view will do), subnet [r, c] of any floating dtype, rows int64 [r], columns int64 [c];
    None stands for all.
    """
    target, values = weight.data, subnet.data.to(weight.dtype)
    if rows is not None and columns is not None:
        target.index_put_((rows[:, None], columns[None, :]), values)
    elif rows is not None:
        target.index_copy_(0, rows, values)
    elif columns is not None:
        target.index_copy_(1, columns, values)
    else:
        target.copy_(values)


def take_subnet(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """matrix[R][:, C] for a whole [m, n] matrix; None stands for all. A copy, unless both are None."""
    if rows is not None:
        matrix = matrix.index_select(0, rows)
    if columns is not None:
        matrix = matrix.index_select(1, columns)
    return matrix


class SubnetLinearFunction(torch.autograd.Function):
    """y = x W^T + b with gradients for x, the subnet and (if it trains) the bias; none for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, subnet: Tensor, layer: SubnetLinear) -> Tensor:
        rows, columns = layer.rows, layer.columns
        matrix = layer.as_rows(weight)
        write_subnet(matrix, subnet, rows, columns)
        ctx.sink = layer.gradient_sink
        # Localizing needs the full gradient, hence all of x; everyone else keeps the subnet's columns alone.
        ctx.save_for_backward(x if columns is None or ctx.sink is not None else x.index_select(-1, columns))
        # References, not saved tensors: a sharded engine empties the weight after forward and gathers it again before
        # backward under the same object.
        ctx.weight, ctx.subnet, ctx.layer = weight, subnet, layer
        ctx.has_bias = bias is not None
        return functional.linear(x, matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        layer, weight, subnet = ctx.layer, ctx.weight, ctx.subnet
        rows, columns = layer.rows, layer.columns
        matrix = layer.as_rows(weight)
        grad_x = grad_subnet = grad_bias = None
        if not layer.weight_is_resident and (ctx.needs_input_grad[0] or ctx.sink is not None):
            write_subnet(matrix, subnet, rows, columns)  # dx reads the weight, and so does the sink
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ matrix.to(grad_y.dtype)
        flat_grad = grad_y.reshape(-1, grad_y.shape[-1])
        flat_saved = saved.reshape(-1, saved.shape[-1])
        if ctx.needs_input_grad[3]:
            if ctx.sink is None:
                chosen = flat_grad if rows is None else flat_grad.index_select(1, rows)
                grad_subnet = chosen.t() @ flat_saved
            else:
                full = flat_grad.t() @ flat_saved
                grad_subnet = take_subnet(full, rows, columns)
                ctx.sink(full, matrix)
            grad_subnet = grad_subnet.to(subnet.dtype)
            if layer.gradient_witness is not None:
                layer.gradient_witness(grad_subnet)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat_grad.sum(0)
        return grad_x, None, grad_bias, grad_subnet, None


class TiedEmbeddingFunction(torch.autograd.Function):
    """Token look-up in a weight that the output layer shares: its gradient belongs to the same subnet rows."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, subnet: Tensor, head: SubnetLinear, padding_index: int | None
    ) -> Tensor:
        write_subnet(weight, subnet, head.rows, head.columns)
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.subnet, ctx.head, ctx.padding_index, ctx.sink = (
            weight,
            subnet,
            head,
            padding_index,
            head.gradient_sink,
        )
        return functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        head, subnet = ctx.head, ctx.subnet
        flat_tokens = tokens.reshape(-1)
        flat_grad = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.padding_index is not None:
            flat_grad = flat_grad * (flat_tokens != ctx.padding_index).unsqueeze(1)
        if ctx.sink is not None:
            if not head.weight_is_resident:
                write_subnet(ctx.weight, subnet, head.rows, head.columns)  # the sink reads the weight
            full = flat_grad.new_zeros(ctx.weight.shape).index_add_(0, flat_tokens, flat_grad)
            grad_subnet = take_subnet(full, head.rows, head.columns)
            ctx.sink(full, ctx.weight)
        elif head.rows is None:
            grad_subnet = flat_grad.new_zeros(subnet.shape).index_add_(0, flat_tokens, flat_grad)
        else:
            # Position of each token among the sorted subnet rows; tokens outside contribute zeros (no host sync).
            position = torch.searchsorted(head.rows, flat_tokens).clamp_(max=head.rows.numel() - 1)
            inside = (head.rows[position] == flat_tokens).unsqueeze(1)
            grad_subnet = flat_grad.new_zeros(subnet.shape).index_add_(0, position, flat_grad * inside)
        return None, None, grad_subnet.to(subnet.dtype), None, None
