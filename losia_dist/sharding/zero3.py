"""Parameters that ZeRO-3 partitions: each rank keeps one flat range of every tensor (`ds_tensor`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import get_z3_leaf_modules
from torch import Tensor, nn

from losia_dist.errors import UnsupportedError
from losia_dist.ranks import compat
from losia_dist.sharding.leaf_modules import refuse_leaf_modules, refuse_listed_experts
from losia_dist.sharding.rank_shares import RankShares
from losia_dist.subnet.layout import Places
from losia_dist.subnet.packed import as_integers


class Zero3Parameters:
    """`ParameterAccess` on flat shards: rank i keeps elements [i k, (i + 1) k) of a tensor, the last shard padded.

    A read sums disjoint parts over the ranks, so it communicates the block that is read and never the whole weight.

    Args:
        model: whose parameters are partitioned.

    Raises:
        UnsupportedError: a second or quantized copy of the weights, or a leaf module that cannot train its subnets.
    """

    weight_is_resident = False

    def __init__(self, model: nn.Module) -> None:
        self._leaves = get_z3_leaf_modules(model)
        refuse_leaf_modules(model)
        refuse_listed_experts(model)
        for name, parameter in model.named_parameters():
            second = getattr(parameter, "ds_secondary_tensor", None)  # none: new, and partitioned once the engine is made
            if second is not None or getattr(parameter, "ds_tensor", parameter).dtype != parameter.dtype:
                raise UnsupportedError(
                    f"ZeRO-3 keeps {name} a second time or quantized (zero_hpz_partition_size, "
                    "zero_quantized_nontrainable_weights): a re-localized subnet would not reach that copy. Remove the setting."
                )

    def reshard(self) -> None:
        """Nothing to do: parameters keep their places between steps."""

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        # DeepSpeed reduces a leaf module's gradients whenever a backward pass leaves it, whether or not any were formed.
        taken = [
            (module, key, hook) for module in self._leaves for key, hook in module._backward_hooks.items() if _reduces(hook)
        ]
        for module, key, _ in taken:
            del module._backward_hooks[key]
        try:
            yield
        finally:
            for module, key, hook in taken:
                module._backward_hooks[key] = hook

    def shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)  # DeepSpeed puts ds_* attributes on parameters

    @torch.no_grad()
    def read_block(self, weight: Any, places: Places) -> Tensor:
        return self._read(weight, places, weight.ds_tensor.data)

    @torch.no_grad()
    def read_bits(self, weight: Any, places: Places) -> Tensor:
        return self._read(weight, places, as_integers(weight.ds_tensor.data).to(torch.int64))

    def _read(self, weight: Any, places: Places, shard: Tensor) -> Tensor:
        """shard: what stands for this rank's flat shard."""
        _, start, stop = self._shard(weight)
        position = self._positions(weight, places).to(shard.device)
        mine = (position >= start) & (position < stop)
        local = (position - start).clamp_(0, max(stop - start - 1, 0))
        if stop > start:
            values = torch.where(mine, shard[local], torch.zeros((), dtype=shard.dtype, device=shard.device))
        else:
            values = torch.zeros(position.shape, dtype=shard.dtype, device=shard.device)
        values = values.to(places[0].device)
        dist.all_reduce(values, group=weight.ds_process_group)
        return values

    @torch.no_grad()
    def write_block(self, weight: Any, places: Places, values: Tensor) -> None:
        self._write(weight, places, weight.ds_tensor.data, weight.data, values)

    @torch.no_grad()
    def write_bits(self, weight: Any, places: Places, bits: Tensor) -> None:
        self._write(weight, places, as_integers(weight.ds_tensor.data), as_integers(weight.data), bits)

    def shares(self, parameter: Any) -> RankShares | None:
        return RankShares.of(parameter.ds_process_group)

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return parameter.dtype

    def _write(self, weight: Any, places: Places, shard: Tensor, whole: Tensor, values: Tensor) -> None:
        _, start, stop = self._shard(weight)
        position = self._positions(weight, places).to(shard.device)
        mine = (position >= start) & (position < stop)
        shard[position[mine] - start] = values.to(shard.device, shard.dtype)[mine]
        if self._is_gathered(weight):  # a small weight that the engine keeps whole beside its shards
            whole[places] = values.to(whole.dtype)

    @torch.no_grad()
    def read_whole(self, parameter: Any) -> Tensor:
        shard = parameter.ds_tensor.data
        world_size = dist.get_world_size(parameter.ds_process_group)
        device = torch.device("cpu") if shard.device.type == "cpu" and parameter.device.type == "cpu" else parameter.device
        whole = torch.empty(world_size * shard.numel(), dtype=shard.dtype, device=device)
        compat.all_gather_flat(whole, shard.to(device), group=parameter.ds_process_group)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    @torch.no_grad()
    def write_whole(self, parameter: Any, values: Tensor) -> None:
        shard, start, stop = self._shard(parameter)
        shard[: stop - start].copy_(values.reshape(-1)[start:stop])
        if self._is_gathered(parameter):
            parameter.data.copy_(values)

    @staticmethod
    def _shard(parameter: Any) -> tuple[Tensor, int, int]:
        """This rank's flat shard and the range of elements it stands for, padding excluded."""
        shard = parameter.ds_tensor.data
        start = min(parameter.ds_numel, dist.get_rank(parameter.ds_process_group) * shard.numel())
        return shard, start, min(parameter.ds_numel, start + shard.numel())

    @staticmethod
    def _positions(weight: Any, places: Places) -> Tensor:
        position = places[0]
        for index, size in zip(places[1:], weight.ds_shape[1:], strict=True):
            position = position * size + index
        return position

    @staticmethod
    def _is_gathered(parameter: Any) -> bool:
        return parameter.ds_status == ZeroParamStatus.AVAILABLE


def _reduces(hook: Any) -> bool:
    return getattr(hook, "__qualname__", "").endswith("reduce_leaf_module_grads")


@torch.no_grad()
def own_range(tensor: Any) -> tuple[Tensor, int]:
    """What this rank keeps of a partitioned parameter: flat [k] without padding, sharing its memory, and the number of elements
    before it in the whole. All of a tensor that is not partitioned. No communication."""
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach().view(-1), 0
    shard, start, stop = Zero3Parameters._shard(tensor)
    return shard[: stop - start], start
