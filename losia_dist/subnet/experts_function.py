"""The forward and backward of experts of which only subnets train: tokens sorted by expert, one grouped product each.

Dimensions in names: t tokens (each as often as experts take it), E experts, m and n neurons, r and c rows and columns of a
subnet.

As for a linear layer (`subnet.function`): the subnets' values are written into the frozen weight, y and dx are one grouped
product each, and of the input only each token's own expert's columns are kept. dS is a grouped product of r x c; a full
gradient is formed for the experts that localize alone. A quantized weight is made dense for the time of a product, and again
in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losia_dist.subnet.capture import refuse_capture
from losia_dist.subnet.grouped import count_of_each, grouped_linear, grouped_outer, narrow_outer, take_of_owner
from losia_dist.subnet.layout import Layout
from losia_dist.subnet.packed import PackedWeight
from losia_dist.subnet.site import GradientSink, Site


class Routing(NamedTuple):
    """Which tokens belong to which experts, tokens sorted by expert.

    offsets: int32 [E], where each expert's tokens end. owners: int64 [t], each token's expert, E - 1 for those of none.
    nobodys: bool [t, 1], tokens that belong to none of these experts; None where there are no such. counts: int64 [E], tokens
    that the router sent to each expert, where more come than those; None: all that come.
    """

    offsets: Tensor
    owners: Tensor
    nobodys: Tensor | None
    counts: Tensor | None = None


def write_subnets(sites: Sequence[Site], weight: Tensor, subnets: Sequence[Tensor], *, always: bool = False) -> None:
    """Write subnets [X, r, c] of any dtype into their experts of a whole weight, in place and unseen by autograd.

    always: also where the weight is known to hold them.
    """
    for site, subnet in zip(sites, subnets, strict=True):
        if always or site.must_write(weight, subnet):
            site.write_into(weight, subnet)


def _whole(
    sites: Sequence[Site],
    weight: Tensor,
    subnets: Sequence[Tensor],
    packed: PackedWeight | None,
    dtype: torch.dtype,
    *,
    again: bool,
) -> Tensor:
    """The whole weight with the subnets' present values, as it is stored plainly: its own memory, or a quantized one's values
    in `dtype`. again: backward asks.
    """
    if packed is not None:
        weight = packed.dense(weight, dtype)
        write_subnets(sites, weight, subnets, always=True)
    elif not again:
        write_subnets(sites, weight, subnets)
    elif not all(site.weight_is_resident for site in sites):
        write_subnets(sites, weight, subnets, always=True)
    return weight


def experts_forward(
    sites: Sequence[Site],
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    layout: Layout,
    packed: PackedWeight | None,
    subnets: Sequence[Tensor],
) -> Tensor:
    """y [t, m] of x [t, n], by the weight with the subnets' present values; rows of nobody's tokens are zero.

    layout: of all experts of the weight. packed: what a quantized weight stores; None: its values. subnets: of `sites`.
    """
    for site in sites[:1]:
        refuse_capture(site.name, x)
    weight = _whole(sites, weight, subnets, packed, x.dtype, again=False)
    if sites and sites[0].module.training:
        counts = count_of_each(routing.offsets) if routing.counts is None else routing.counts
        for site in sites:
            site.see_tokens(counts)
    y = grouped_linear(x, layout.matrices(weight).to(x.dtype), routing.offsets)
    return y if routing.nobodys is None else y.masked_fill_(routing.nobodys, 0)


def experts_backward(
    sites: Sequence[Site],
    grad_y: Tensor,
    kept: Tensor,
    routing: Routing,
    weight: Tensor,
    layout: Layout,
    packed: PackedWeight | None,
    subnets: Sequence[Tensor],
    sinks: Sequence[GradientSink | None],
    *,
    needs_x: bool,
    needs_subnets: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx [t, n], and dS [X, r, c] of each site in its subnet's dtype; None where it is not needed.

    kept: all of x [t, n] if any site has a sink, else each token's own columns [t, c].
    """
    for site in sites[:1]:
        refuse_capture(site.name, grad_y)
    # dx reads the weight, and so do the sinks, which other ranks may have (reduction="by_rank").
    if needs_x or any(sink is not None for sink in sinks) or (packed is not None and packed.needs_all_ranks):
        weight = _whole(sites, weight, subnets, packed, grad_y.dtype, again=True)
    if routing.nobodys is not None:
        grad_y = grad_y.masked_fill(routing.nobodys, 0)
    grad_x = None
    if needs_x:
        grad_x = grouped_linear(grad_y, layout.matrices(weight).to(grad_y.dtype).transpose(-2, -1), routing.offsets)
        if routing.nobodys is not None:
            grad_x = grad_x.masked_fill_(routing.nobodys, 0)
    if not needs_subnets:
        return grad_x, [None] * len(sites)
    x_columns = kept if all(sink is None for sink in sinks) else kept_of(sites, kept, routing)
    full_rows = sites[0].takes_all_rows
    dy_rows = grad_y if full_rows else take_of_owner(grad_y, _of_all(sites, "row_index"), routing.owners)
    gradients = narrow_outer(dy_rows, x_columns, routing.offsets)
    found: list[Tensor | None] = []
    for site, subnet, sink in zip(sites, subnets, sinks, strict=True):
        experts = site.here.experts
        assert experts is not None
        mine = gradients[experts[0] : experts[1]].to(subnet.dtype)
        if len(sites) > 1:
            mine = mine.clone()  # no part keeps the others' memory
        site.in_mid_step = True
        if site.gradient_witness is not None:
            site.gradient_witness(mine)
        if sink is not None:
            _give_full(site, grad_y, kept, routing.offsets, weight, sink)
        found.append(mine)
    return grad_x, found


def _give_full(site: Site, grad_y: Tensor, x: Tensor, offsets: Tensor, weight: Tensor, sink: Any) -> None:
    """Form the full gradients [X, m, n] of a site's experts, and hand them over."""
    experts = site.here.experts
    assert experts is not None
    start, stop = experts
    matrices = site.here.matrices(weight)
    if getattr(sink, "one_at_a_time", False):
        sink.note_call()  # experts may all be without a token
        ends = [0, *offsets.tolist()]  # before training: the host waits
        for place, expert in enumerate(range(start, stop)):
            mine = slice(ends[expert], ends[expert + 1])
            if mine.stop > mine.start:
                sink(grad_y[mine].t() @ x[mine], matrices[place], site.first_here + place)
        return
    # Where the first of these experts' tokens begin is known to the device alone: those before them make one group more.
    skip = min(start, 1)
    full = grouped_outer(grad_y, x, offsets[start - skip : stop])
    sink(full[skip:], matrices)


def _of_all(sites: Sequence[Site], index: str) -> Tensor:
    """Row or column index [E, ...] of all experts of a weight."""
    found = [site.index_here(getattr(site, index)) for site in sites]
    return found[0] if len(found) == 1 else torch.cat(found)


def kept_of(sites: Sequence[Site], x: Tensor, routing: Routing) -> Tensor:
    """x[i, C[e(i)]] of each token: [t, c]; x itself where subnets take all columns."""
    return x if sites[0].takes_all_columns else take_of_owner(x, _of_all(sites, "col_index"), routing.owners)


class SubnetExpertsFunction(torch.autograd.Function):
    """y[i] = W[e(i)] x[i] with gradients for x and the subnets; none for W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing: Routing,
        weight: Tensor,
        layout: Layout,
        packed: PackedWeight | None,
        sites: list[Site],
        *subnets: Tensor,
    ) -> Tensor:
        ctx.sinks = [site.gradient_sink for site in sites]
        keeps_all = any(sink is not None for sink in ctx.sinks)
        if sites:
            ctx.save_for_backward(x if keeps_all else kept_of(sites, x, routing))
        # References, not saved tensors: a sharded engine empties the weight after forward and gathers it again before
        # backward under the same object.
        ctx.weight, ctx.layout, ctx.packed, ctx.sites, ctx.subnets, ctx.routing = (
            weight,
            layout,
            packed,
            sites,
            subnets,
            routing,
        )
        return experts_forward(sites, x, routing, weight, layout, packed, subnets)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors[0] if ctx.sites else grad_y
        needs_x, needs_subnets = ctx.needs_input_grad[0], any(ctx.needs_input_grad[6:])
        grad_x, gradients = experts_backward(
            ctx.sites,
            grad_y.contiguous(),
            kept,
            ctx.routing,
            ctx.weight,
            ctx.layout,
            ctx.packed,
            ctx.subnets,
            ctx.sinks,
            needs_x=needs_x,
            needs_subnets=needs_subnets,
        )
        return grad_x, None, None, None, None, None, *gradients
