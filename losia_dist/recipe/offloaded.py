"""Activations that wait for backward in host memory: the inputs of decoder layers, from which recomputation begins."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from losia_dist.errors import ConfigError


def offload_checkpoints(model: nn.Module) -> int:
    """Let every layer that recomputes its inside keep its input on the host, by torch's own hooks. Returns how many do.

    Call it after `gradient_checkpointing_enable`, without reentrant checkpoints. What layers share (masks, cosines) stays.

    Raises:
        ConfigError: no layer recomputes anything.
    """
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [module for module in found if getattr(module, "gradient_checkpointing", False)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layer whose inside is recomputed: activations have nothing to wait on the host "
            "for. Call model.gradient_checkpointing_enable() first."
        )
    for module in layers:
        kept: Any = module._gradient_checkpointing_func
        module._gradient_checkpointing_func = _on_host(kept)  # type: ignore[assignment]
    return len(layers)


def _on_host(recompute: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(recompute)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            return recompute(*args, **kwargs)

    return run


def _pack(tensor: Tensor) -> Any:
    """What a checkpoint keeps: inputs that need no gradient are shared by layers, and stay where they are."""
    if not tensor.requires_grad or tensor.numel() == 0:
        return tensor
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    there.copy_(tensor.detach(), non_blocking=True)
    return tensor.device, there


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, there = packed
    back: Tensor = there.to(device, non_blocking=True)
    return back
