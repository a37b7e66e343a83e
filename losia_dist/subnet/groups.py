"""Optimizer parameter groups: one per decoder layer, so that each can be rewarmed and cleared by itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.subnet.routers import router_parameters

GROUP_KEY = "losia_group"  # key in an optimizer's parameter group: the name of the group of layers it holds
ROUTERS = "routers of experts"  # name of the group of routers that train in full


def losia_parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: one per group of subnets, one for routers, one for whatever else trains.

    Call after `get_losia_model` and, for engines that replace parameters (FSDP2), after wrapping. Every group carries
    "params", "lr", "weight_decay" and its name under "losia_group" (None for the rest, which is never rewarmed).

    Raises:
        ConfigError: the model has no subnets.
    """
    sites = find_sites(model)
    if not sites:
        raise ConfigError("the model has no subnets: call get_losia_model(model, config) first.")
    common = {"lr": lr, "weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": [site.subnet for site in sites if site.group_name == name], GROUP_KEY: name, **common}
        for name in group_names(sites)
    ]
    subnets = {id(site.subnet) for site in sites}
    routers = router_parameters(model)
    if routers:
        groups.append({"params": routers, GROUP_KEY: ROUTERS, **common})
    known = subnets | {id(p) for p in routers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    if others:
        groups.append({"params": others, GROUP_KEY: None, **common})
    return groups
