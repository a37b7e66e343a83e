"""Parameter groups of full fine-tuning: one per decoder layer, as LoSiA has them."""

from __future__ import annotations

from typing import Any

from torch import nn

from losia_dist.subnet.targets import group_of


def dense_parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups of everything that trains: one per decoder layer, and one per module outside of them.

    `LoSiAAdamW` updates group by group, with fp32 copies of one group's gradients; with a single group for a bf16 model
    they would be as large as its master values. Call after wrapping, for engines that replace parameters (FSDP2).
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": weight_decay} for params in groups.values()]
