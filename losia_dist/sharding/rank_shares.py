"""`RankShares`: the ranks that share a weight, and so keep parts of what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.ranks import compat


@dataclass(frozen=True)
class RankShares:
    """`subnet.differences.Shares` over a process group."""

    group: Any

    @classmethod
    def of(cls, group: Any) -> RankShares | None:
        """None where this rank is alone in the group."""
        return cls(group) if dist.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> RankShares:
        return self  # a process group cannot be copied

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def gather(self, part: Tensor) -> Tensor:
        whole = torch.empty(self.count, part.numel(), dtype=part.dtype, device=part.device)
        compat.all_gather_flat(whole.view(-1), part, group=self.group)
        return whole
