"""Parameters and state that FSDP2 (`fully_shard`) shards, HSDP's two-dimensional meshes included.

A sharded parameter is a DTensor: each rank keeps one block of it (rows, as `fully_shard` cuts by default) and replicas of
HSDP keep the same block. Indexing a DTensor in place raises, so everything here works on the local block.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

from losia_dist.errors import UnsupportedError
from losia_dist.sharding.expert_parallel import check_parallelism, is_spread, is_whole_expert
from losia_dist.sharding.rank_shares import RankShares
from losia_dist.sharding.torch_state import TorchState
from losia_dist.subnet.layout import Places
from losia_dist.subnet.packed import as_integers, packed_of, packed_weights


class FullyShardParameters:
    """`ParameterAccess` on DTensors. A read sums disjoint parts over the shards: the block that is read, never the weight.

    Args:
        model: after `fully_shard` was applied to it.

    Raises:
        UnsupportedError: a parameter that trains but is not sharded beside others that are (its gradient would never be
            reduced), or a placement that is neither a shard nor a replica.
    """

    weight_is_resident = False

    def __init__(self, model: nn.Module) -> None:
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.reshard()
        check_parallelism(getattr(getattr(model, "config", None), "distributed_config", None))
        _refuse_unsharded(model)
        _refuse_codes(model, self._units)

    def reshard(self) -> None:
        # An evaluation leaves units that do not reshard after forward gathered: their modules hold plain tensors, which
        # the next forward pass would take as they are, without what the optimizer has changed since.
        for unit in self._units:
            unit.reshard()

    def without_reduction(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    @torch.no_grad()
    def read_block(self, weight: Any, places: Places) -> Tensor:
        return self._read(weight, places, local_part(weight))

    @torch.no_grad()
    def read_bits(self, weight: Any, places: Places) -> Tensor:
        return self._read(weight, places, as_integers(local_part(weight)).to(torch.int64))

    def _read(self, weight: Any, places: Places, local: Tensor) -> Tensor:
        """local: what stands for this rank's block."""
        mine, inside = _find(weight, places)
        if local.numel():
            values = torch.where(inside, local[mine], torch.zeros((), dtype=local.dtype, device=local.device))
        else:
            values = torch.zeros(inside.shape, dtype=local.dtype, device=local.device)
        values = values.to(places[0].device)
        for dimension, placement in enumerate(weight.placements):
            if not placement.is_replicate():
                dist.all_reduce(values, group=weight.device_mesh.get_group(dimension))
        return values

    @torch.no_grad()
    def write_block(self, weight: Any, places: Places, values: Tensor) -> None:
        self._write(weight, places, local_part(weight), values)

    @torch.no_grad()
    def write_bits(self, weight: Any, places: Places, bits: Tensor) -> None:
        self._write(weight, places, as_integers(local_part(weight)), bits)

    def shares(self, parameter: Any) -> RankShares | None:
        mesh, placements = parameter.device_mesh, parameter.placements
        cut = [dimension for dimension, placement in enumerate(placements) if not placement.is_replicate()]
        return RankShares.of(mesh.get_group(cut[0])) if len(cut) == 1 else None

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return parameter.dtype

    def _write(self, weight: Any, places: Places, local: Tensor, values: Tensor) -> None:
        mine, inside = _find(weight, places)
        if local.numel():
            chosen = torch.where(inside)
            here = tuple(place.expand_as(inside)[chosen] for place in mine)
            local[here] = values.to(local.device, local.dtype)[chosen]

    @torch.no_grad()
    def read_whole(self, parameter: Any) -> Tensor:
        return whole_of(parameter)

    @torch.no_grad()
    def write_whole(self, parameter: Any, values: Tensor) -> None:
        local_part(parameter).copy_(cut_like(parameter, values))


class FullyShardState:
    """`StateAccess` for a torch optimizer whose parameters are the model's DTensors."""

    one_scalar_per_group = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._whole = TorchState(optimizer)

    @torch.no_grad()
    def write_master(self, parameter: Any, values: Tensor) -> None:
        holder = self._whole.master_fragment(parameter)
        if holder is not parameter and holder is not None:
            local_part(holder).copy_(cut_like(holder, values))

    def master_fragment(self, parameter: nn.Parameter) -> Tensor | None:
        holder = self._whole.master_fragment(parameter)
        return None if holder is None else local_part(holder)

    def stepped(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        found = self._whole.stepped(parameter)
        return None if found is None else (local_part(found[0]), local_part(found[1]))

    def without_padding(self, gradient: Tensor, parameter: Tensor) -> list[Tensor]:
        return [gradient]

    def read_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {key: whole_of(tensor) for key, tensor in self._whole.read_state(parameter).items()}

    @torch.no_grad()
    def write_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        self.write_master(parameter, state["value"])
        self._whole.store_entries(parameter, state, lambda entry, values: local_part(entry).copy_(cut_like(entry, values)))

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        self._whole.clear(group_name, restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        return [local_part(tensor) for tensor in self._whole.state_tensors()]


@torch.no_grad()
def whole_of(tensor: Tensor) -> Tensor:
    """A DTensor's whole values, of its own shape and dtype, on every rank, on the mesh's device; a copy of any other tensor.

    Called by all ranks of the mesh.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    # Offloaded to the CPU, a shard is out of reach of the mesh's backend.
    local = local_part(tensor).to(tensor.device_mesh.device_type)
    whole = DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
    return whole.full_tensor()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's block of a DTensor (a subnet's rows [<= r, c]), sharing its memory; any other tensor as it is."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def cut_like(tensor: Tensor, values: Tensor) -> Tensor:
    """The part of whole `values`, of the tensor's shape and any dtype, that this rank keeps of `tensor`: a view of them, of its
    block's shape. No communication."""
    if not isinstance(tensor, DTensor):
        return values
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    for dimension, (size, start) in enumerate(zip(shape, offset, strict=True)):
        values = values.narrow(dimension, min(start, values.shape[dimension]), size)
    return values


@torch.no_grad()
def own_range(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank keeps of a tensor that `fully_shard` cut by rows: flat [k], sharing its memory, and the number of
    elements before it in the whole. All of a tensor that is not sharded. No communication."""
    local = local_part(tensor).view(-1)
    if not isinstance(tensor, DTensor):
        return local, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, offset[0] * tensor.stride(0)


def _find(weight: DTensor, places: Places) -> tuple[Places, Tensor]:
    """The places in the local block, and which of the elements it holds: bool, of the shape that the places broadcast to.

    Places of elements that other ranks hold are clamped into the block; no host synchronisation.
    """
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    mine, held = [], []
    for index, size, start in zip(places, shape, offset, strict=True):
        index = index.to(local_part(weight).device) - start
        held.append((index >= 0) & (index < size))
        mine.append(index.clamp(0, max(size - 1, 0)))
    return tuple(mine), functools.reduce(torch.logical_and, held)


def _refuse_codes(model: nn.Module, units: list[Any]) -> None:
    """Codes of a quantized weight that are left out of sharding, or would be cast whenever they are gathered."""
    layers = packed_weights(model)
    for name, layer in layers.items():
        if not isinstance(layer.weight, DTensor):
            raise UnsupportedError(
                f"{name} is quantized and not sharded, while other layers are: every rank would hold all of it. Accelerate "
                "leaves out codes that are stored as whole numbers: load the model with bnb_4bit_quant_storage=torch.bfloat16."
            )
    for unit in units:
        group = unit._get_fsdp_state()._fsdp_param_group
        for one in [] if group is None else group.fsdp_params:
            info, dtype = one._module_info, one.mp_policy.param_dtype
            packed = packed_of(info.module, info.param_name)
            if packed is not None and dtype not in (None, packed.storage):
                packed.check_storage(torch.empty(0, dtype=dtype))


def _refuse_unsharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            if parameter.requires_grad:
                raise UnsupportedError(
                    f"{name} trains but is not sharded, while other parameters are: FSDP2 would never reduce its gradient. "
                    "Call fully_shard on the whole model after its layers."
                )
            continue
        if parameter.requires_grad and is_whole_expert(parameter):
            raise UnsupportedError(
                f"{name} trains in full within experts that are spread over ranks, and is not spread with them: the ranks of "
                "an expert-parallel group would each train their own. Leave it out of what trains in full, or use fsdp_size "
                "alone."
            )
        # Experts that are spread over ranks are cut twice, and FSDP2 says so by a placement of its own.
        known = (Shard, Replicate, _StridedShard) if is_spread(parameter) else (Shard, Replicate)
        strange = [p for p in parameter.placements if type(p) not in known]
        if strange:
            raise UnsupportedError(
                f"{name} is placed as {strange[0]}: tensor parallel plans are not supported; use fully_shard alone, or with "
                "expert parallelism (losia_dist.load_distributed_model)."
            )
