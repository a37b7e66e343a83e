"""Optimizer state under ZeRO: flat fp32 partitions of one parameter group each.

Reads the internals of deepspeed 0.19: `single_partition_of_fp32_groups` (stages 1 and 2), `fp32_groups_flat_partition`
(BF16_Optimizer), `fp32_partitioned_groups_flat`, `sub_group_to_group_id` and `grad_position` (stage 3), and `_hp_mapping`.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor
from torch.optim import Optimizer

from losia_dist import compat
from losia_dist.sharding.clearing import clear_state
from losia_dist.sharding.interface import as_tensor, store_state
from losia_dist.subnet.groups import GROUP_KEY


class ZeroState:
    """`StateAccess` for stages 1 and 2, and for the BF16_Optimizer that stage 1 uses with fp32 gradient accumulation.

    A group's flat fp32 vector is cut into equal parts, one a rank; a subnet may lie in one part, in two, or in none.
    """

    one_scalar_per_group = True

    def __init__(self, zero_optimizer: Any) -> None:
        self.optimizer: Optimizer = zero_optimizer.optimizer
        groups = getattr(zero_optimizer, "bit16_groups", None) or zero_optimizer.bf16_groups
        self._group_of = {parameter: place for place, group in enumerate(groups) for parameter in group}

    def write_master(self, parameter: Any, values: Tensor) -> None:
        safe_set_full_fp32_param(parameter, values)  # each rank keeps what falls into its partition

    def master_fragment(self, parameter: Any) -> Tensor | None:
        mapping = parameter._hp_mapping
        return None if mapping is None else mapping.get_hp_fragment()

    @torch.no_grad()
    def read_state(self, parameter: Any) -> dict[str, Tensor]:
        flat = self._flat(parameter)
        read: dict[str, Tensor] = {}
        for key, value in {"value": flat, **self.optimizer.state.get(flat, {})}.items():
            tensor = as_tensor(value)
            if tensor is None:
                continue
            read[key] = self._whole(parameter, tensor) if tensor.shape == flat.shape else tensor.detach().clone()
        return read

    @torch.no_grad()
    def write_state(self, parameter: Any, state: dict[str, Tensor]) -> None:
        self.write_master(parameter, state["value"])
        flat = self._flat(parameter)
        mapping = parameter._hp_mapping

        def store(entry: Tensor, values: Tensor) -> None:
            if mapping is not None:
                whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
                entry.narrow(0, part.start, part.numel).copy_(values.reshape(-1).narrow(0, whole.start, whole.numel))

        store_state(self.optimizer.state[flat], state, flat, store, self.optimizer)

    def _flat(self, parameter: Any) -> Tensor:
        """This rank's part of the vector that the parameter's group is flattened into."""
        flat: Tensor = self.optimizer.param_groups[self._group_of[parameter]]["params"][0]
        return flat

    @staticmethod
    def _whole(parameter: Any, vector: Tensor) -> Tensor:
        """The parameter's part of a vector that lies over the ranks like the group's, whole and in its shape."""
        whole = torch.zeros(parameter.numel(), dtype=vector.dtype, device=parameter.device)
        mapping = parameter._hp_mapping
        if mapping is not None:
            place, part = mapping.lp_fragment_address, mapping.hp_fragment_address
            whole.narrow(0, place.start, place.numel).copy_(vector.detach().narrow(0, part.start, part.numel))
        # Summed as bytes: parts are disjoint, and a sum of floats would lose the sign of a zero.
        torch.distributed.all_reduce(whole.view(torch.uint8), group=parameter._dp_group)
        return whole.view(parameter.shape)

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        for group in self.optimizer.param_groups:
            if group[GROUP_KEY] == group_name:
                clear_state(self.optimizer, group["params"], restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return masters + _state_vectors(self.optimizer)


class Zero3State:
    """`StateAccess` for stage 3: each rank keeps an equal part of every parameter, the last one padded."""

    one_scalar_per_group = True

    def __init__(self, zero_optimizer: Any) -> None:
        self._zero = zero_optimizer
        self.optimizer: Optimizer = zero_optimizer.optimizer

    @torch.no_grad()
    def write_master(self, parameter: Any, values: Tensor) -> None:
        shard = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32, device=values.device)
        start = torch.distributed.get_rank(parameter.ds_process_group) * shard.numel()
        mine = values.reshape(-1)[start : start + shard.numel()]
        shard[: mine.numel()] = mine
        safe_set_local_fp32_param(parameter, shard)

    def master_fragment(self, parameter: Any) -> Tensor | None:
        return safe_get_local_fp32_param(parameter)

    @torch.no_grad()
    def read_state(self, parameter: Any) -> dict[str, Tensor]:
        flat, start, count = self._place(parameter)
        read: dict[str, Tensor] = {}
        for key, value in {"value": flat, **self.optimizer.state.get(flat, {})}.items():
            tensor = as_tensor(value)
            if tensor is None:
                continue
            if tensor.shape != flat.shape:
                read[key] = tensor.detach().clone()
                continue
            shard = tensor.detach().narrow(0, start, count).to(parameter.device)
            group = parameter.ds_process_group
            whole = shard.new_empty(torch.distributed.get_world_size(group) * count)
            compat.all_gather_flat(whole, shard, group=group)
            read[key] = whole[: parameter.ds_numel].view(parameter.ds_shape)
        return read

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


def _state_vectors(optimizer: Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
