"""Experts that are modules of their own (`nn.ModuleList`, `nn.ModuleDict`): each linear layer holds a subnet as any other does.

A step in which no token of a rank reaches an expert gives that rank no gradient for it, while engines wait for one on every
rank. So the block that holds the experts gives each of their subnets a gradient of zeros as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from losia_dist.subnet.site import Site

_LISTED = "losia_listed_experts"  # in a block: its experts' layers


def is_listed(name: str) -> bool:
    """Whether a linear layer's full name places it among experts ("model.layers.0.mlp.experts.3.w1")."""
    return "experts" in name.split(".")


def block_of(name: str) -> str:
    """Full name of the module that holds the experts which a linear layer of this full name is one of."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("experts")])


def watch_listed(model: nn.Module, sites: Iterable[Site]) -> None:
    """Let every block that holds experts as modules give all their subnets a gradient in each backward."""
    blocks: dict[str, list[nn.Module]] = {}
    for site in sites:
        if site.experts is None and is_listed(site.name):
            blocks.setdefault(block_of(site.name), []).append(site.module)
    for name, layers in blocks.items():
        block = model.get_submodule(name)
        block.__dict__[_LISTED] = layers  # not submodules: the model's tree stays as it was
        block.register_forward_hook(_touch)


def listed_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that hold experts with subnets as modules of their own, by full name."""
    return {name: module for name, module in model.named_modules() if _LISTED in module.__dict__}


def _touch(block: nn.Module, inputs: Any, output: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return output
    layers: list[Any] = block.__dict__[_LISTED]
    found, form = tree_flatten(output)
    for place, one in enumerate(found):
        if isinstance(one, Tensor) and one.requires_grad and one.is_floating_point():
            found[place] = _GiveZeros.apply(one, [layer.site for layer in layers], *(layer.subnet for layer in layers))
            break
    return tree_unflatten(found, form)


class _GiveZeros(torch.autograd.Function):
    """The block's output as it is; a gradient of zeros for every subnet."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sites: list[Site], *subnets: Tensor) -> Tensor:
        ctx.sites, ctx.subnets = sites, subnets
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros_like(subnet) for subnet in ctx.subnets]
        for site, zero in zip(ctx.sites, zeros, strict=True):
            site.in_mid_step = True
            if site.gradient_witness is not None:
                site.gradient_witness(zero)
        return grad, None, *zeros
