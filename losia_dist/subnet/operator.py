"""The subnet linear as custom operators, so that `torch.compile` keeps a model with subnets in one graph.

Under compilation nothing of a site but tensors reaches run time. The operators find the site again by the memory of its
`row_index`, and with it whether it localizes now: moving the slot on needs no new compilation.

The operators are declared to change nothing. They do write the subnet into its weight, as the eager path does; the weight's
meaning (the frozen weight with the subnet in place) is the same before and after, and no compiler must copy it for that.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from losia_dist.errors import UnsupportedError
from losia_dist.subnet.blocks import take_last
from losia_dist.subnet.capture import NEVER_CAPTURED
from losia_dist.subnet.function import embedding_backward, embedding_forward, subnet_backward, subnet_forward
from losia_dist.subnet.site import Site

_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()  # by the address of row_index
_tickets = itertools.count(1)


def make_findable(sites: Iterable[Site]) -> None:
    """Let compiled code find these sites; called once they are on their devices."""
    for site in sites:
        _sites[site.row_index.data_ptr()] = site


def find_site(row_index: Tensor) -> Site:
    """The site with this row index, whatever tensor object stands for it in a graph."""
    site = _sites.get(row_index.data_ptr())
    if site is None or site.row_index.data_ptr() != row_index.data_ptr():
        raise UnsupportedError(
            "a compiled model with subnets ran before LoSiA(model, optimizer, config) was made, or was moved to another device "
            "after it. Move the model first, then make LoSiA(...), then run it."
        )
    return site


def next_ticket() -> int:
    """A number for an input that awaits its backward; never 0."""
    return next(_tickets)


@torch.library.custom_op("losia_dist::subnet_linear", mutates_args=(), tags=NEVER_CAPTURED)
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, subnet: Tensor, row_index: Tensor, col_index: Tensor, m: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x[..., C] for backward (empty if C takes all columns), and a ticket for all of x while the layer localizes."""
    site = find_site(row_index)
    ticket = 0
    if site.gradient_sink is not None and site.module.training:
        ticket = next_ticket()
        site.kept_inputs[ticket] = x.clone()  # the compiler may reuse the memory of x
    kept = x.new_empty(0) if site.takes_all_columns else take_last(x, col_index)
    return subnet_forward(site, x, weight, bias, subnet), kept, torch.tensor(ticket)


@_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, subnet: Tensor, row_index: Tensor, col_index: Tensor, m: int, n: int
) -> Any:
    columns = col_index.shape[0]
    kept = x.new_empty(0) if columns == n else x.new_empty(*x.shape[:-1], columns)
    return x.new_empty(*x.shape[:-1], m), kept, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("losia_dist::subnet_linear_backward", mutates_args=(), tags=NEVER_CAPTURED)
def _linear_backward(
    grad_y: Tensor, kept: Tensor, ticket: Tensor, weight: Tensor, subnet: Tensor, row_index: Tensor, n: int, needs_x: bool
) -> tuple[Tensor, Tensor]:
    site, number = find_site(row_index), int(ticket)  # on the CPU: no device is waited for
    sink = site.gradient_sink
    if sink is not None:
        if number == 0:
            raise UnsupportedError(
                f"{site.name} localizes, and its forward ran in evaluation mode under torch.compile: call model.train()."
            )
        kept = site.kept_inputs.pop(number)
    grad_x, grad_subnet = subnet_backward(site, grad_y, kept, weight, subnet, sink, needs_x=needs_x, needs_subnet=True)
    assert grad_subnet is not None
    return grad_y.new_empty(0) if grad_x is None else grad_x, grad_subnet


@_linear_backward.register_fake
def _(
    grad_y: Tensor, kept: Tensor, ticket: Tensor, weight: Tensor, subnet: Tensor, row_index: Tensor, n: int, needs_x: bool
) -> tuple[Tensor, Tensor]:
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], n) if needs_x else grad_y.new_empty(0)
    return grad_x, torch.empty_like(subnet, memory_format=torch.contiguous_format)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, subnet, row_index, col_index, _, ctx.n = inputs
    _, kept, ticket = output
    takes_all = col_index.shape[0] == ctx.n
    ctx.save_for_backward(x if takes_all else kept, ticket, weight, subnet, row_index)
    ctx.has_bias = bias is not None


def _linear_gradients(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    kept, ticket, weight, subnet, row_index = ctx.saved_tensors
    needs_x, _, needs_bias = ctx.needs_input_grad[:3]
    grad_x, grad_subnet = _linear_backward(grad_y.contiguous(), kept, ticket, weight, subnet, row_index, ctx.n, needs_x)
    grad_bias = grad_y.flatten(0, -2).sum(0) if ctx.has_bias and needs_bias else None
    return grad_x if needs_x else None, None, grad_bias, grad_subnet, None, None, None, None


_linear.register_autograd(_linear_gradients, setup_context=_linear_setup)


def compiled_linear(layer: Any, x: Tensor) -> Tensor:
    """`SubnetLinearFunction` of a `SubnetLinear`, for a graph: x [..., n] -> [..., m]."""
    shape = layer.out_features, layer.in_features
    y, _, _ = _linear(x, layer.weight, layer.bias, layer.subnet, layer.row_index, layer.col_index, *shape)
    return y


@torch.library.custom_op("losia_dist::subnet_embedding", mutates_args=(), tags=NEVER_CAPTURED)
def _embedding(tokens: Tensor, weight: Tensor, subnet: Tensor, row_index: Tensor, padding_index: int) -> Tensor:
    return embedding_forward(find_site(row_index), tokens, weight, subnet)


@_embedding.register_fake
def _(tokens: Tensor, weight: Tensor, subnet: Tensor, row_index: Tensor, padding_index: int) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


@torch.library.custom_op("losia_dist::subnet_embedding_backward", mutates_args=(), tags=NEVER_CAPTURED)
def _embedding_backward(
    grad_y: Tensor, tokens: Tensor, weight: Tensor, subnet: Tensor, row_index: Tensor, padding_index: int
) -> Tensor:
    head = find_site(row_index)
    padding = None if padding_index < 0 else padding_index
    return embedding_backward(head, grad_y, tokens, weight, subnet, head.gradient_sink, padding)


@_embedding_backward.register_fake
def _(grad_y: Tensor, tokens: Tensor, weight: Tensor, subnet: Tensor, row_index: Tensor, padding_index: int) -> Tensor:
    return torch.empty_like(subnet, memory_format=torch.contiguous_format)


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, subnet, row_index, ctx.padding_index = inputs
    ctx.save_for_backward(tokens, weight, subnet, row_index)


def _embedding_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weight, subnet, row_index = ctx.saved_tensors
    grad_subnet = _embedding_backward(grad_y.contiguous(), tokens, weight, subnet, row_index, ctx.padding_index)
    return None, None, grad_subnet, None, None


_embedding.register_autograd(_embedding_gradients, setup_context=_embedding_setup)


def compiled_embedding(head: Any, tokens: Tensor, weight: Tensor, subnet: Tensor, padding_index: int | None) -> Tensor:
    """`TiedEmbeddingFunction` for a graph: int64 [...] -> [..., n]."""
    return _embedding(tokens, weight, subnet, head.row_index, -1 if padding_index is None else padding_index)
