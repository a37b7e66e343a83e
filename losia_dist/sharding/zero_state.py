"""Optimizer state under ZeRO: flat fp32 partitions of one parameter group each.

Reads the internals of deepspeed 0.19: `single_partition_of_fp32_groups` (stages 1 and 2), `fp32_groups_flat_partition`
(BF16_Optimizer), `fp32_partitioned_groups_flat` and `sub_group_to_group_id` (stage 3).
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor
from torch.optim import Optimizer

from losia_dist.sharding.interface import clear_state
from losia_dist.subnet.groups import GROUP_KEY


class ZeroState:
    """`StateAccess` for stages 1 and 2, and for the BF16_Optimizer that stage 1 uses with fp32 gradient accumulation.

    A group's flat fp32 vector is cut into equal parts, one a rank; a subnet may lie in one part, in two, or in none.
    """

    def __init__(self, zero_optimizer: Any) -> None:
        self.optimizer: Optimizer = zero_optimizer.optimizer

    def write_master(self, parameter: Any, values: Tensor) -> None:
        safe_set_full_fp32_param(parameter, values)  # each rank keeps what falls into its partition

    def master_fragment(self, parameter: Any) -> Tensor | None:
        mapping = parameter._hp_mapping
        return None if mapping is None else mapping.get_hp_fragment()

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        for group in self.optimizer.param_groups:
            if group[GROUP_KEY] == group_name:
                clear_state(self.optimizer, group["params"], restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return masters + _state_vectors(self.optimizer)


class Zero3State:
    """`StateAccess` for stage 3: each rank keeps an equal part of every parameter, the last one padded."""

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

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        zero = self._zero
        for place, partition in enumerate(zero.fp32_partitioned_groups_flat):
            if self.optimizer.param_groups[zero.sub_group_to_group_id[place]][GROUP_KEY] == group_name:
                clear_state(self.optimizer, [partition], restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat) + _state_vectors(self.optimizer)


def _state_vectors(optimizer: Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
