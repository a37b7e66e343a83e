"""Experts with subnets as custom operators, so that `torch.compile` keeps a layer of them in one graph (`subnet.operator`).

t tokens sorted by expert, E experts, m and n neurons, r and c rows and columns of a subnet. The sites of a weight are found
again by the memory of the first one's row index; moving a slot on needs no new compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losia_dist.errors import UnsupportedError
from losia_dist.subnet.capture import NEVER_CAPTURED
from losia_dist.subnet.experts_function import Routing, experts_backward, experts_forward, kept_of
from losia_dist.subnet.layout import Layout
from losia_dist.subnet.operator import find_site, next_ticket
from losia_dist.subnet.site import Site


def compiled_experts(sites: Sequence[Site], x: Tensor, routing: Routing, weight: Tensor) -> Tensor:
    """`SubnetExpertsFunction` for a graph: x [t, n] -> [t, m]."""
    first, subnets = sites[0], [site.subnet for site in sites]
    y, _, _ = _experts(x, *routing, weight, subnets, first.row_index, first.col_index.shape[-1], first.shape[0])
    return y


def _found(row_index: Tensor) -> tuple[list[Site], Layout]:
    first = find_site(row_index)
    module: Any = first.module
    parameter = first.names.weight
    return [site for site in module.sites if site.names.weight == parameter], module.layouts[parameter]


@torch.library.custom_op("losia_dist::subnet_experts", mutates_args=(), tags=NEVER_CAPTURED)
def _experts(
    x: Tensor,
    offsets: Tensor,
    owners: Tensor,
    nobodys: Tensor | None,
    counts: Tensor | None,
    weight: Tensor,
    subnets: Sequence[Tensor],
    row_index: Tensor,
    columns: int,
    m: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x[i, C[e(i)]] for backward (empty if C takes all columns), and a ticket for all of x while experts localize."""
    sites, layout = _found(row_index)
    routing, ticket = Routing(offsets, owners, nobodys, counts), 0
    if sites[0].module.training and any(site.gradient_sink is not None for site in sites):
        ticket = next_ticket()
        sites[0].kept_inputs[ticket] = x.clone()  # the compiler may reuse the memory of x
    kept = x.new_empty(0) if sites[0].takes_all_columns else kept_of(sites, x, routing)
    return experts_forward(sites, x, routing, weight, layout, sites[0].packed, subnets), kept, torch.tensor(ticket)


@_experts.register_fake
def _(
    x: Tensor,
    offsets: Tensor,
    owners: Tensor,
    nobodys: Tensor | None,
    counts: Tensor | None,
    weight: Tensor,
    subnets: Sequence[Tensor],
    row_index: Tensor,
    columns: int,
    m: int,
) -> Any:
    kept = x.new_empty(0) if columns == x.shape[1] else x.new_empty(x.shape[0], columns)
    return x.new_empty(x.shape[0], m), kept, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("losia_dist::subnet_experts_backward", mutates_args=(), tags=NEVER_CAPTURED)
def _experts_backward(
    grad_y: Tensor,
    kept: Tensor,
    ticket: Tensor,
    offsets: Tensor,
    owners: Tensor,
    nobodys: Tensor | None,
    weight: Tensor,
    subnets: Sequence[Tensor],
    row_index: Tensor,
    needs_x: bool,
    n: int,
) -> list[Tensor]:
    """dx (empty if it is not needed), and dS of each part."""
    sites, layout = _found(row_index)
    sinks, number = [site.gradient_sink for site in sites], int(ticket)  # on the CPU: no device is waited for
    if any(sink is not None for sink in sinks):
        if number == 0:
            raise UnsupportedError(
                f"{sites[0].name} localizes, and its forward ran in evaluation mode under torch.compile: call model.train()."
            )
        kept = sites[0].kept_inputs.pop(number)
    routing = Routing(offsets, owners, nobodys)
    grad_x, gradients = experts_backward(
        sites,
        grad_y,
        kept,
        routing,
        weight,
        layout,
        sites[0].packed,
        subnets,
        sinks,
        needs_x=needs_x,
        needs_subnets=True,
    )
    found = [gradient for gradient in gradients if gradient is not None]
    return [grad_y.new_empty(0) if grad_x is None else grad_x, *found]


@_experts_backward.register_fake
def _(
    grad_y: Tensor,
    kept: Tensor,
    ticket: Tensor,
    offsets: Tensor,
    owners: Tensor,
    nobodys: Tensor | None,
    weight: Tensor,
    subnets: Sequence[Tensor],
    row_index: Tensor,
    needs_x: bool,
    n: int,
) -> list[Tensor]:
    grad_x = grad_y.new_empty(grad_y.shape[0], n) if needs_x else grad_y.new_empty(0)
    return [grad_x, *(torch.empty_like(subnet, memory_format=torch.contiguous_format) for subnet in subnets)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, offsets, owners, nobodys, _, weight, subnets, row_index, columns, _ = inputs
    _, kept, ticket = output
    ctx.n = x.shape[1]
    takes_all = columns == ctx.n
    ctx.save_for_backward(x if takes_all else kept, ticket, offsets, owners, nobodys, weight, row_index, *subnets)


def _gradients(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
    kept, ticket, offsets, owners, nobodys, weight, row_index, *subnets = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, *gradients = _experts_backward(
        grad_y.contiguous(), kept, ticket, offsets, owners, nobodys, weight, subnets, row_index, needs_x, ctx.n
    )
    return grad_x if needs_x else None, None, None, None, None, None, gradients, None, None, None


_experts.register_autograd(_gradients, setup_context=_setup)
