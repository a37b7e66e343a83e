"""Weights of a plain model directory back into a live run, whatever engine holds it: `load_best_model_at_end`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from losia_dist.checkpoint.tensor_names import plain_entries, unwrap
from losia_dist.export.weight_files import weight_map
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.conductor import LoSiA
from losia_dist.subnet.access import read_subnet


@torch.no_grad()
def load_plain_weights(losia: LoSiA, directory: str | Path, device: torch.device, agreement: Agreement) -> None:
    """Give the model the weights of a directory that `export_model` wrote; the subnets stay where they are.

    Called on all ranks; rank 0 reads, one tensor at a time, and broadcasts. The optimizer's master values follow; its
    moments are left.

    Args:
        device: where the ranks' process group communicates.
        agreement: of all ranks.

    Raises:
        CheckpointError: a file cannot be read, or a weight is in none of them; on every rank before any weight is changed.
    """
    losia.parameters.reshard()
    entries: dict[Tensor, list[str]] = {}  # the model's own tensors, as this rank holds them, with all of their names
    for name, tensor in plain_entries(unwrap(losia.model)):
        entries.setdefault(tensor, []).append(name)
    files = agreement.on_first(f"reading {directory}", lambda: _places(entries, Path(directory)))
    for tensor, (file, key) in zip(entries, files, strict=True):
        shape = losia.parameters.shape(tensor) if isinstance(tensor, nn.Parameter) else tuple(tensor.shape)
        values = torch.empty(shape, dtype=tensor.dtype, device=device)
        if agreement.rank == 0:
            with safe_open(file, framework="pt") as opened:
                values.copy_(opened.get_tensor(key))
        if agreement.world_size > 1:
            dist.broadcast(values, src=0)
        _write(losia, tensor, values)
    for site in losia.sites:
        values = read_subnet(losia.parameters, site, site.row_index, site.col_index)
        _write(losia, site.subnet, values)


def _write(losia: LoSiA, tensor: Tensor, values: Tensor) -> None:
    if not isinstance(tensor, nn.Parameter):
        tensor.copy_(values)
        return
    losia.parameters.write_whole(tensor, values)
    if tensor.requires_grad:
        losia.state.write_master(tensor, values.to(torch.float32))


def _places(entries: dict[Tensor, list[str]], directory: Path) -> list[tuple[str, str]]:
    """For each entry, the file that holds it and the name it has there (a tied tensor is stored under one of its names)."""
    stored = weight_map(directory)
    found = [next((name for name in names if name in stored), names[0]) for names in entries.values()]
    return [(str(directory / stored[name]), name) for name in found]
