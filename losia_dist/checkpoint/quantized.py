"""A quantized base in a checkpoint: not its codes, which any run loads again, but their print, and what subnets left beside
them.

Names of tensors: `overlay/<layer>/<number>/rows`, `/columns`, `/experts` (where they are not all), `/codes` and `/scales`;
where subnets are rounded into the codes instead (retired="stochastic"), the codes themselves, `codes/<layer>`. The layer of
experts is their weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.safetensors_io import dtype_name
from losia_dist.errors import CheckpointError
from losia_dist.sharding.packed_access import PackedAccess
from losia_dist.subnet.differences import Left
from losia_dist.subnet.packed import PackedParameter, same_scales
from losia_dist.subnet.site import Site


def describe_quantized(access: Any, quantized: Mapping[str, PackedParameter]) -> dict[str, Any]:
    """Kind, shape, dtype of the values, print of the codes, figures of their scales, by layer; called by all ranks, which
    gather each weight once.
    """
    return {} if not quantized else {name: _describe(access, one) for name, one in quantized.items()}


def _describe(access: PackedAccess, one: PackedParameter) -> dict[str, Any]:
    packed = one.packed
    entry = {"shape": list(packed.shape), "dtype": dtype_name(packed.dtype), "print": access.print_of(one)}
    if packed.layout.experts is not None:
        entry |= {"experts": packed.shape[0], "transposed": packed.layout.transposed}
    return {**packed.describe(), **entry, "scales": packed.figures(), "retired": packed.retired, "moves": packed.moves}


def read_quantized(
    access: Any, quantized: Mapping[str, PackedParameter], keep: Callable[[str, Tensor], None], rank: int, world_size: int
) -> None:
    """Give `keep` this rank's share of what subnets left. Called by all ranks."""
    for place, (name, one) in enumerate(quantized.items()):
        packed, mine = one.packed, place % world_size == rank
        if packed.overlay is None:
            if _sites_of(one):
                codes = access.read_codes(one.weight)
                if mine:
                    keep(f"codes/{name}", codes.reshape(-1).view(torch.uint8))
            continue
        for number, left in enumerate(packed.overlay.read()):
            for part, tensor in left._asdict().items():
                if mine and tensor is not None:
                    keep(f"overlay/{name}/{number}/{part}", tensor)


def write_quantized(access: Any, quantized: Mapping[str, PackedParameter], reader: Reader) -> None:
    """Put it back, each rank what it keeps. Called by all ranks, after `check_quantized`."""
    for name, one in quantized.items():
        packed, sites = one.packed, _sites_of(one)
        packed.moves = reader.manifest["quantized"][name]["moves"]
        if packed.overlay is not None:
            # On the device that computes: each pass reads it, and would send it there again.
            device = sites[0].row_index.device if sites else one.weight.device
            packed.overlay.write(left.to(device) for left in overlay_of(reader, name))
        elif sites:  # before the first move too: this run's may have been rounded since
            codes = reader.tensor(f"codes/{name}").view(packed.storage)
            access.write_codes(one.weight, codes)


def _sites_of(one: PackedParameter) -> list[Site]:
    """Of the subnets that move in it."""
    return [site for site in one.module.__dict__.get("sites", ()) if site.names.weight == one.parameter]


def overlay_of(reader: Reader, layer: str) -> list[Left]:
    """What subnets left in a layer, in order, on the CPU."""
    found: dict[int, dict[str, Any]] = {}
    for number, part, tensor in reader.numbered(f"overlay/{layer}/"):
        found.setdefault(number, {"rows": None, "columns": None})[part] = tensor
    return [Left(**found[number]) for number in sorted(found)]


def check_quantized(here: dict[str, Any], saved: dict[str, Any], path: Any) -> None:
    """Refuse a base whose codes are not those that the checkpoint was made over.

    Args:
        here: from `describe_quantized`, of the live run. saved: that of the checkpoint's manifest.

    Raises:
        CheckpointError: the first layer that differs.
    """
    for name in sorted({*here, *saved}):
        one, other = saved.get(name), here.get(name)
        if one is None or other is None:
            raise CheckpointError(
                f"{name} is quantized in {'this run' if one is None else path}, and not in the other of the two: "
                "load the base model as for the saved run."
            )
        for key in [key for key in one if key not in ("moves", "print", "scales", "made_from")]:
            if one[key] != other.get(key):
                raise CheckpointError(f"{path} has {name} with {key} {one[key]}, and this run has {other.get(key)}.")
        if one["print"] != other["print"] or not same_scales(one["scales"], other["scales"]):
            raise CheckpointError(
                f"the codes or scales of {name} are not those that {path} was made over: another version of the base model, or "
                "one quantized with other settings or another release. Load the same base; what subnets left is relative to it."
            )
