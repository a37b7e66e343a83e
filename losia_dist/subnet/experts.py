"""Experts of a mixture whose fused weights are frozen and whose subnets are ordinary small parameters.

For a weight W [E, m, n] the module has `W_subnet` [E, r, c], `W_row_index` [E, r] and `W_col_index` [E, c]; where experts
localize in parts, one of each for every part: `W_subnet_0` [X, r, c], `W_subnet_1`, ... The names of all else stay.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.ranks.fingerprint import loading_print
from losia_dist.subnet.autocast import autocast_dtype
from losia_dist.subnet.copied import HoldsSites, check_copy
from losia_dist.subnet.dispatch import Dispatch
from losia_dist.subnet.expert_weights import is_of, weights_of
from losia_dist.subnet.experts_function import Routing, SubnetExpertsFunction
from losia_dist.subnet.experts_operator import compiled_experts
from losia_dist.subnet.grouped import grouped_linear
from losia_dist.subnet.layout import Layout
from losia_dist.subnet.packed import PackedWeight, packed_of
from losia_dist.subnet.site import Site, TensorNames

_MIXED: dict[tuple[Any, Any], Any] = {}
_logger = logging.getLogger(__name__)


class SubnetWeights(HoldsSites):
    """A module with fused expert weights of which some hold subnets; `project` computes with one of them.

    Attributes:
        sites: of all its weights, parts of a weight in their order.
        layouts: parameter -> how it stores all of its experts.
    """

    layouts: dict[str, Layout]

    def project(self, x: Tensor, routing: Routing, parameter: str) -> Tensor:
        """y[i] = W[e(i)] x[i] for tokens [t, n] sorted by expert: [t, m]. Under autocast in the autocast dtype."""
        sites = [site for site in self.sites if site.names.weight == parameter]
        _measure_inputs(sites, x, routing)
        device = x.device.type
        dtype = autocast_dtype(device, any(site.subnet.requires_grad for site in sites))
        if dtype is None:
            return self._compute(x, routing, parameter, sites)
        with torch.autocast(device, enabled=False):
            return self._compute(x.to(dtype), routing, parameter, sites)

    def _compute(self, x: Tensor, routing: Routing, parameter: str, sites: list[Site]) -> Tensor:
        weight, layout, packed = getattr(self, parameter), self.layouts[parameter], packed_of(self, parameter)
        if torch.compiler.is_compiling() and sites:
            y = compiled_experts(sites, x, routing, weight)
        elif torch.compiler.is_compiling() and packed is None:
            y = grouped_linear(x, layout.matrices(weight).to(x.dtype), routing.offsets)
        elif torch.compiler.is_compiling():
            y = self.__dict__["compute"](x, routing, weight, layout, packed)
        else:
            for site in sites:
                if site.copied is not None:
                    check_copy(site)
            y = SubnetExpertsFunction.apply(x, routing, weight, layout, packed, sites, *(site.subnet for site in sites))
        bias = getattr(self, f"{parameter}_bias", None)
        return y if bias is None else y + bias.to(y.dtype)[routing.owners]

    def extra_repr(self) -> str:
        parts = [f"{site.names.subnet}={'x'.join(map(str, site.subnet.shape))}" for site in self.sites]
        return ", ".join(filter(None, [super().extra_repr(), *parts]))


class SubnetExperts(SubnetWeights):
    """Experts with the forward that nearly all families of Transformers have; their own gate and norm are used."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [t, n], their experts int64 [t, k] and the experts' weights [t, k] -> [t, n]."""
        module: Any = self
        dispatch = Dispatch(top_k_index, module.num_experts, bool(getattr(self, "_is_expert_parallel", False)))
        routing = dispatch.routing
        x = dispatch.scatter(hidden_states)
        if getattr(self, "has_gate", True):
            x = module._apply_gate(self.project(x, routing, "gate_up_proj"))
        else:
            x = module.act_fn(self.project(x, routing, "up_proj"))
        x = self.project(x, routing, "down_proj")
        if getattr(self, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        weights = top_k_weights.reshape(-1)[dispatch.order]
        if routing.nobodys is not None:
            weights = weights.masked_fill(routing.nobodys.squeeze(-1), 0)
        return dispatch.gather(x * weights.unsqueeze(-1)).to(hidden_states.dtype)


class SubnetSortedExperts(SubnetWeights):
    """Llama 4's experts: every expert gets every token, those that it was not sent scaled to nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[E t, n], the tokens of each expert behind those of the one before -> [E t, n]."""
        module: Any = self
        tokens = hidden_states.shape[0] // module.num_experts
        experts = torch.arange(module.num_experts, device=hidden_states.device)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        counts = x.detach().any(-1).view(module.num_experts, tokens).sum(1)
        routing = Routing(((experts + 1) * tokens).to(torch.int32), experts.repeat_interleave(tokens), None, counts)
        gate, up = self.project(x, routing, "gate_up_proj").chunk(2, dim=-1)
        return self.project(up * module.act_fn(gate), routing, "down_proj")


class SubnetStackedWeights(SubnetWeights):
    """DBRX's experts' weights, which lie under each other in two dimensions, in a module of their own."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Tokens [t, n], sorted by expert -> [t, n]."""
        module: Any = self
        gate = module.activation_fn(self.project(x, routing, "w1"))
        return self.project(gate * self.project(x, routing, "v1"), routing, "w2")


class SubnetStackedExperts(nn.Module):
    """DBRX's experts."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[b, s, n], experts int64 [b s, k] and weights [b s, k] -> [b, s, n]."""
        module: Any = self
        shape = hidden_states.shape
        dispatch = Dispatch(top_k_index, module.num_experts, has_nobodys=False)
        x = module.mlp(dispatch.scatter(hidden_states.reshape(-1, shape[-1])), dispatch.routing)
        weights = top_k_weights.reshape(-1)[dispatch.order]
        return dispatch.gather(x * weights.unsqueeze(-1)).view(shape).to(hidden_states.dtype)


def adopt_packed_experts(owner: Any) -> None:
    """Turn a module of experts whose weights are stored as codes into one that computes with them, before it has subnets."""
    for holder in dict.fromkeys(holder for holder, _, _ in weights_of(owner)):
        _adopt(owner, holder)
        holder.__dict__["compute"] = torch.compiler.disable(_frozen)


def _frozen(x: Tensor, routing: Routing, weight: Tensor, layout: Layout, packed: PackedWeight) -> Tensor:
    return SubnetExpertsFunction.apply(x, routing, weight, layout, packed, [])  # type: ignore[no-any-return]


def add_expert_site(
    owner: Any,
    holder: Any,
    *,
    parameter: str,
    part: int,
    layout: Layout,
    weight_name: str,
    name: str,
    group_name: str,
    shape: tuple[int, int],
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    asked_dtype: torch.dtype | None = None,
) -> Site:
    """Give experts of a fused weight subnets, in place, and return their site.

    owner: the module whose forward computes; holder: that has the weight. rows int64 [X, r], columns int64 [X, c] sorted;
    values [X, r, c], the weight's at those places.
    """
    _adopt(owner, holder)
    suffix = "" if part < 0 else f"_{part}"
    names = TensorNames(parameter, *(f"{parameter}_{what}{suffix}" for what in ("subnet", "row_index", "col_index")))
    weight = getattr(holder, parameter)
    weight.requires_grad_(False)
    setattr(holder, names.subnet, nn.Parameter(values))
    holder.register_buffer(names.row_index, rows)
    holder.register_buffer(names.col_index, columns)
    site = Site(
        holder,
        name=name,
        group_name=group_name,
        is_output=False,
        shape=shape,
        layout=layout,
        asked_dtype=asked_dtype,
        names=names,
        weight_name=weight_name,
        part=part,
    )
    site.converted_print = loading_print(values)
    holder.sites.append(site)
    return site


def hold_experts(module: SubnetWeights, start: int, stop: int) -> None:
    """From here on the module computes with experts [start, stop) of its weights, and other ranks with the others.

    Weights and subnets are then [stop - start, ...] where it computes; indices stay whole.
    """
    module.layouts = {name: replace(layout, experts=(0, stop - start)) for name, layout in module.layouts.items()}
    for site in module.sites:
        site.held = (start, stop)


def _adopt(owner: Any, holder: Any) -> None:
    """Turn a module of experts in place into one that computes with subnets, once."""
    if isinstance(holder, SubnetWeights):
        return
    holder.layouts = {parameter: layout for _, parameter, layout in weights_of(owner)}
    if is_of(owner, "dbrx", "DbrxExperts"):
        owner.__class__ = _mixed(SubnetStackedExperts, type(owner))
        kind: type[SubnetWeights] = SubnetStackedWeights
    else:
        kind = SubnetSortedExperts if is_of(owner, "llama4", "Llama4TextExperts") else SubnetExperts
        _say_what_computes(owner)
    holder.__class__ = _mixed(kind, type(holder))
    holder.sites = []


def _mixed(kind: Any, own: Any) -> Any:
    """A module's class keeps its other methods: its gate, its norm."""
    if (kind, own) not in _MIXED:
        _MIXED[kind, own] = type(f"Subnet{own.__name__}", (kind, own), {})
    return _MIXED[kind, own]


@cache
def _warn_once(asked: str) -> None:
    _logger.warning(
        "experts with subnets compute by grouped matrix products (torch.nn.functional.grouped_mm); experts_implementation=%r "
        "is not used for them",
        asked,
    )


def _say_what_computes(owner: Any) -> None:
    asked = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    if asked not in (None, "grouped_mm"):
        _warn_once(asked)


def _measure_inputs(sites: list[Site], x: Tensor, routing: Routing) -> None:
    """Hand each expert's tokens to what measures them; before training, when the host may wait."""
    if all(site.input_sink is None for site in sites):
        return
    ends = [0, *routing.offsets.tolist()]
    for site in sites:
        experts = site.here.experts
        assert experts is not None
        for place, expert in enumerate(range(*experts)):
            if site.input_sink is not None:
                mine = x[ends[expert] : ends[expert + 1]]
                # Where all tokens come to all experts, those that the router sent elsewhere are zero.
                site.input_sink(mine if routing.counts is None else mine[mine.any(-1)], site.first_here + place)
