"""The gradients' norm where parameters lie on more than one mesh, as those of experts do under expert parallelism."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.errors import ConfigError


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Scale gradients in place so that their global 2-norm is at most `max_norm`; returns the norm before, fp32 [].

    As `torch.nn.utils.clip_grad_norm_`, which fails where gradients lie on several meshes. Each shard counts once and replicas
    do not; of gradients that are no DTensors every rank is taken to hold the same (one process, DDP). Called by all ranks,
    after backward; one all-reduce of a number for each sharded dimension of each mesh, and no host synchronisation.

    Raises:
        ConfigError: max_norm is not above 0; parameters that DeepSpeed holds (it clips by itself: "gradient_clipping").
    """
    if not max_norm > 0:
        raise ConfigError(f"max_norm={max_norm!r}: a number above 0 is needed; leave the call out to clip nothing.")
    held = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(hasattr(parameter, "ds_id") for parameter in held):
        raise ConfigError('DeepSpeed holds these parameters and clips by itself: set "gradient_clipping" in its configuration.')
    kinds: dict[Any, list[Tensor]] = {}
    locals_: list[Tensor] = []
    for gradient in [parameter.grad for parameter in held if parameter.grad is not None]:
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        locals_.append(local)
        kinds.setdefault(_lies_on(gradient), []).append(local)
    if not locals_:
        return torch.zeros(())
    total = torch.zeros((), device=locals_[0].device)
    for (mesh, dimensions), parts in kinds.items():
        filled = [part for part in parts if part.numel()]
        norms = torch._foreach_norm(filled, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum() if norms else total.new_zeros(())
        for dimension in dimensions:
            square = _summed(square, mesh, dimension)
        total = total + square.to(total.device)
    norm = total.sqrt()
    torch._foreach_mul_(locals_, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _lies_on(gradient: Any) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a gradient, and its dimensions that cut it."""
    if not hasattr(gradient, "placements"):
        return None, ()
    cut = tuple(d for d, placement in enumerate(gradient.placements) if not placement.is_replicate())
    return gradient.device_mesh, cut


def _summed(square: Tensor, mesh: Any, dimension: int) -> Tensor:
    device = square.device
    square = square.to(mesh.device_type)  # offloaded gradients are out of reach of the mesh's backend
    dist.all_reduce(square, group=mesh.get_group(dimension))
    return square.to(device)
