"""Optimizer state under ZeRO: flat fp32 partitions of one parameter group each.

Reads the internals of deepspeed 0.19. Stages 1 and 2: `round_robin_bit16_groups` and `round_robin_bit16_offsets` (where each
parameter really lies: DeepSpeed's own `_hp_mapping`, and with it `safe_set_full_fp32_param`, looks elsewhere under
`round_robin_gradients`), `bit16_groups_flat`. BF16_Optimizer: `bf16_groups`, `bf16_groups_flat`. Both:
`real_dp_process_group`. Stage 3: `fp32_partitioned_groups_flat`, `fp16_partitioned_groups(_flat)`, `sub_group_to_group_id`
and `grad_position`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losia_dist.errors import UnsupportedError
from losia_dist.ranks import compat
from losia_dist.sharding.entries import as_tensor, clear_state, store_state
from losia_dist.subnet.groups import GROUP_KEY


@dataclass(frozen=True)
class _Part:
    """What one rank keeps of a parameter: `count` elements (0: none), from `inside` of it on, at `start` of the partition."""

    group: int
    inside: int
    start: int
    count: int

    def of(self, partition: Tensor) -> Tensor:
        """The part of a vector that lies as the partition does; a view."""
        return partition.narrow(0, self.start, self.count)

    def of_whole(self, values: Tensor) -> Tensor:
        """The same elements of the whole parameter's values, flat."""
        return values.reshape(-1).narrow(0, self.inside, self.count)


class ZeroState:
    """`StateAccess` for stages 1 and 2, and for the BF16_Optimizer that stage 1 uses with fp32 gradient accumulation.

    A group's flat fp32 vector is cut into equal parts, one a rank; a subnet may lie in one part, in two, or in none.

    Raises:
        UnsupportedError: masters that are not fp32.
    """

    one_scalar_per_group = True

    def __init__(self, zero_optimizer: Any) -> None:
        _refuse_low_precision(zero_optimizer)
        self.optimizer: Optimizer = zero_optimizer.optimizer
        self._zero = zero_optimizer
        self._parts = dict(_parts(zero_optimizer))

    @torch.no_grad()
    def write_master(self, parameter: Any, values: Tensor) -> None:
        part = self._parts[parameter]  # each rank keeps what falls into its partition
        part.of(self._flat(parameter).data).copy_(part.of_whole(values))

    def master_fragment(self, parameter: Any) -> Tensor | None:
        part = self._parts[parameter]
        return part.of(self._flat(parameter).detach()) if part.count else None

    def stepped(self, parameter: Any) -> tuple[Tensor, Tensor] | None:
        # A step writes each partition's masters into its part of the flat model vector, which the parameters are views of:
        # so a parameter's memory tells which masters it is stepped from.
        vectors = self._zero.bit16_groups_flat if hasattr(self._zero, "bit16_groups_flat") else self._zero.bf16_groups_flat
        for group, vector in enumerate(vectors):
            offset = (parameter.data_ptr() - vector.data_ptr()) // vector.element_size()
            if 0 <= offset < vector.numel():
                part = _part(self._zero, group, offset, parameter.numel(), vector.numel())
                holder = self.optimizer.param_groups[group]["params"][0]
                master = self.optimizer.state.get(holder, {}).get("master", holder).detach()
                return (part.of(master), part.of_whole(parameter.detach())) if part.count else None
        return None

    def without_padding(self, gradient: Tensor, parameter: Tensor) -> list[Tensor]:
        return [gradient]  # padded with zeros

    @torch.no_grad()
    def read_state(self, parameter: Any) -> dict[str, Tensor]:
        return _read_entries(self.optimizer, self._flat(parameter), lambda vector: self._whole(parameter, vector))

    @torch.no_grad()
    def write_state(self, parameter: Any, state: dict[str, Tensor]) -> None:
        self.write_master(parameter, state["value"])
        flat, part = self._flat(parameter), self._parts[parameter]

        def store(entry: Tensor, values: Tensor) -> None:
            part.of(entry).copy_(part.of_whole(values))

        store_state(self.optimizer.state[flat], state, flat, store, self.optimizer)

    def _flat(self, parameter: Any) -> Tensor:
        """This rank's part of the vector that the parameter's group is flattened into."""
        flat: Tensor = self.optimizer.param_groups[self._parts[parameter].group]["params"][0]
        return flat

    def _whole(self, parameter: Any, vector: Tensor) -> Tensor:
        """The parameter's part of a vector that lies over the ranks like the group's, whole and in its shape."""
        whole = torch.zeros(parameter.numel(), dtype=vector.dtype, device=parameter.device)
        part = self._parts[parameter]
        part.of_whole(whole).copy_(part.of(vector.detach()))
        # Summed as bytes: parts are disjoint, and a sum of floats would lose the sign of a zero.
        torch.distributed.all_reduce(whole.view(torch.uint8), group=self._zero.real_dp_process_group[part.group])
        return whole.view(parameter.shape)

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        for group in self.optimizer.param_groups:
            if group[GROUP_KEY] == group_name:
                clear_state(self.optimizer, group["params"], restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return masters + _state_vectors(self.optimizer)


class Zero3State:
    """`StateAccess` for stage 3: each rank keeps an equal part of every parameter, the last one padded.

    Raises:
        UnsupportedError: masters that are not fp32, or that a second optimizer steps.
    """

    one_scalar_per_group = True

    def __init__(self, zero_optimizer: Any) -> None:
        _refuse_low_precision(zero_optimizer)
        if hasattr(zero_optimizer, "backup_optimizer"):
            raise UnsupportedError(
                f"DeepSpeed offloads a part of the optimizer (ratio {zero_optimizer.partial_offload}) and steps the rest with "
                "a second optimizer, whose moments no re-localization would clear: set offload_optimizer's ratio to 1.0."
            )
        self._zero = zero_optimizer
        self.optimizer: Optimizer = zero_optimizer.optimizer

    @torch.no_grad()
    def write_master(self, parameter: Any, values: Tensor) -> None:
        flat, start, count = self._place(parameter)
        first = torch.distributed.get_rank(parameter.ds_process_group) * count
        mine = values.reshape(-1)[first : first + count]
        flat.data.narrow(0, start, mine.numel()).copy_(mine)

    def master_fragment(self, parameter: Any) -> Tensor | None:
        flat, start, count = self._place(parameter)
        return flat.detach().narrow(0, start, count)

    def stepped(self, parameter: Any) -> tuple[Tensor, Tensor] | None:
        # A step writes each sub-group's masters into its flat model vector and cuts that into the parameters' shards, in the
        # order of its list.
        zero = self._zero
        for group, shards in enumerate(zero.fp16_partitioned_groups):
            offset = 0
            for shard in shards:
                if shard is parameter.ds_tensor:
                    holder = zero.fp32_partitioned_groups_flat[group]
                    master = self.optimizer.state.get(holder, {}).get("master", holder).detach()
                    model = zero.fp16_partitioned_groups_flat[group]
                    first = torch.distributed.get_rank(parameter.ds_process_group) * shard.ds_numel
                    count = min(shard.ds_numel, max(parameter.ds_numel - first, 0))  # without padding
                    return (master.narrow(0, offset, count), model.narrow(0, offset, count)) if count else None
                offset += shard.ds_numel
        return None

    def without_padding(self, gradient: Tensor, parameter: Tensor) -> list[Tensor]:
        zero = self._zero
        group = next(i for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if flat is parameter)
        found, start = [], 0
        for held in zero.fp16_groups[group]:
            size = held.ds_tensor.ds_numel  # of every rank's part of it, padding included
            first = torch.distributed.get_rank(held.ds_process_group) * size
            found.append(gradient.narrow(0, start, max(0, min(size, held.ds_numel - first))))
            start += size
        return [part for part in found if part.numel()]

    @torch.no_grad()
    def read_state(self, parameter: Any) -> dict[str, Tensor]:
        flat, start, count = self._place(parameter)
        group = parameter.ds_process_group

        def gather(vector: Tensor) -> Tensor:
            shard = vector.detach().narrow(0, start, count).to(parameter.device)
            whole = shard.new_empty(torch.distributed.get_world_size(group) * count)
            compat.all_gather_flat(whole, shard, group=group)
            return whole[: parameter.ds_numel].view(parameter.ds_shape)

        return _read_entries(self.optimizer, flat, gather)

    @torch.no_grad()
    def write_state(self, parameter: Any, state: dict[str, Tensor]) -> None:
        self.write_master(parameter, state["value"])
        flat, start, count = self._place(parameter)
        first = torch.distributed.get_rank(parameter.ds_process_group) * count

        def store(entry: Tensor, values: Tensor) -> None:
            mine = values.reshape(-1)[first : first + count]
            entry.narrow(0, start, mine.numel()).copy_(mine)

        store_state(self.optimizer.state[flat], state, flat, store, self.optimizer)

    def _place(self, parameter: Any) -> tuple[Tensor, int, int]:
        """The flat vector that holds this rank's part of the parameter, where it starts, and its length, padding included."""
        group, start, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return self._zero.fp32_partitioned_groups_flat[group], start, count

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        zero = self._zero
        for place, partition in enumerate(zero.fp32_partitioned_groups_flat):
            if self.optimizer.param_groups[zero.sub_group_to_group_id[place]][GROUP_KEY] == group_name:
                clear_state(self.optimizer, [partition], restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat) + _state_vectors(self.optimizer)


def _parts(zero: Any) -> Iterator[tuple[Any, _Part]]:
    """Every trained parameter of stages 1 and 2 (or BF16_Optimizer), and what this rank keeps of it, by DeepSpeed's lists."""
    in_order = hasattr(zero, "bf16_groups")
    vectors = zero.bf16_groups_flat if in_order else zero.bit16_groups_flat
    for group, parameters in enumerate(zero.bf16_groups if in_order else zero.round_robin_bit16_groups):
        sizes = [parameter.numel() for parameter in parameters]
        offsets = [sum(sizes[:place]) for place in range(len(sizes))] if in_order else zero.round_robin_bit16_offsets[group]
        for parameter, offset in zip(parameters, offsets, strict=True):
            yield parameter, _part(zero, group, offset, parameter.numel(), vectors[group].numel())


def _part(zero: Any, group: int, offset: int, numel: int, length: int) -> _Part:
    """This rank's part of the elements [offset, offset + numel) of a group's vector of `length` elements."""
    ranks = zero.real_dp_process_group[group]
    size = length // torch.distributed.get_world_size(ranks)
    first = torch.distributed.get_rank(ranks) * size
    start, stop = max(offset, first), min(offset + numel, first + size)
    if start >= stop:
        return _Part(group, 0, 0, 0)
    return _Part(group, start - offset, start - first, stop - start)


def _read_entries(optimizer: Optimizer, flat: Tensor, whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`StateAccess.read_state` of a parameter in a flat vector; whole: its part of a vector of that length, whole."""
    found = {key: as_tensor(value) for key, value in {"value": flat, **optimizer.state.get(flat, {})}.items()}
    return {k: whole(t) if t.shape == flat.shape else t.detach().clone() for k, t in found.items() if t is not None}


def _refuse_low_precision(zero: Any) -> None:
    dtype = getattr(zero, "master_weights_and_grads_dtype", torch.float32)
    if dtype != torch.float32:
        raise UnsupportedError(
            f"DeepSpeed keeps master weights in {dtype} (bf16_master_weights_and_grads or fp16_master_weights_and_grads): "
            "subnets are stepped from fp32 masters; remove the setting."
        )


def _state_vectors(optimizer: Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
