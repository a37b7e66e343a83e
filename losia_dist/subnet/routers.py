"""Routers of experts that train in full, at a rate of their own (`router_lr_scale`)."""

from __future__ import annotations

from torch import nn

_MARK = "losia_trains_router"


def mark_router(module: nn.Module) -> None:
    """Let a router train, and be known as one by whoever makes parameter groups."""
    setattr(module, _MARK, True)
    module.requires_grad_(True)


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the routers that train, in the model's order."""
    return [p for module in model.modules() if getattr(module, _MARK, False) for p in module.parameters() if p.requires_grad]
