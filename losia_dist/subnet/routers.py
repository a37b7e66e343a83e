"""Routers of experts that train in full, at a rate of their own (`router_lr_scale`)."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

_MARK = "losia_trains_router"
_BALANCES = "correction_bias"  # ends the name of what enters the choice of experts alone, which has no gradient


def mark_router(module: nn.Module, frozen: Set[int]) -> None:
    """Let a router train, and be known as one by whoever makes parameter groups.

    What balances the load by shifting the choice stays frozen: no gradient reaches it, for which engines would wait, and weight
    decay would undo it.

    Args:
        frozen: ids of the parameters that were frozen in the model as it was given. Where a router was as a whole, all of it
            that can train does.
    """
    setattr(module, _MARK, True)
    usable = [parameter for name, parameter in module.named_parameters() if not name.endswith(_BALANCES)]
    for parameter in [p for p in usable if id(p) not in frozen] or usable:
        parameter.requires_grad_(True)


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the routers that train, in the model's order."""
    return [p for module in model.modules() if getattr(module, _MARK, False) for p in module.parameters() if p.requires_grad]
