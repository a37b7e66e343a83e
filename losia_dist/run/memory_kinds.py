"""What a rank's memory is taken by, counted from the tensors themselves: `losia_memory.json`, for `losia-dist report`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.run.log_files import MEMORY
from losia_dist.run.run_facts import peak_memory
from losia_dist.subnet.convert import find_sites

KINDS = ("weights", "trained", "optimizer", "importance", "host")


def write_memory(
    directory: Path, step: int, model: nn.Module, optimizer: Any, accumulators: Iterable[Any], device: Any
) -> None:
    """Write what `held_by_kind` counts, after optimizer step `step`, and the peak so far. Of the rank that calls it.

    Raises:
        OSError: the directory cannot be written to.
    """
    held = held_by_kind(model, optimizer, accumulators, device)
    content = {"step": step, "held": held, "peak": peak_memory(device)}
    (directory / MEMORY).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def held_by_kind(model: nn.Module, optimizer: Any, accumulators: Iterable[Any], device: torch.device) -> dict[str, int]:
    """Bytes of the tensors that this rank keeps between two steps, each counted once; nothing is communicated or waited for.

    Args:
        model: wrapped or not. optimizer: torch's, or a DeepSpeed or Accelerate wrapper of one.
        accumulators: of the layers that localize (`LoSiA.accumulators.values()`).
        device: where the run computes; what lies on the host beside a GPU is "host", of whatever kind it is.

    Returns:
        weights: parameters that do not train, and buffers. trained: what trains, and the places of subnets. optimizer: moments,
        and master values that are not the parameters themselves. importance: averages, and gradients on their way into them.
        host: see device. Gradients, activations and what an engine gathers for a moment are none of these.
    """
    held, seen = dict.fromkeys(KINDS, 0), set[int]()

    def take(kind: str, tensors: Iterable[Any]) -> None:
        for tensor in map(_kept, tensors):
            if tensor.nbytes and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                held[kind if tensor.device.type == device.type else "host"] += tensor.nbytes

    take("trained", (parameter for parameter in model.parameters() if parameter.requires_grad))
    take("trained", (index for site in find_sites(model) for index in (site.row_index, site.col_index)))
    take("weights", [*model.parameters(), *model.buffers()])
    take("optimizer", _of_optimizer(optimizer))
    for one in accumulators:
        take("importance", (t for t in (one.mean, one.deviation, one.gradient, one.weight_rows) if t is not None))
    return held


def _kept(tensor: Any) -> Tensor:
    """What this rank keeps of a tensor: its part under ZeRO-3, its rows under FSDP2, the whole of any other."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor  # type: ignore[no-any-return]
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()


def _of_optimizer(optimizer: Any) -> Iterator[Tensor]:
    while hasattr(optimizer, "optimizer"):  # DeepSpeed's and Accelerate's
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        yield from group["params"]
    for parameter, state in optimizer.state.items():
        yield parameter
        yield from (value for value in state.values() if isinstance(value, Tensor))
