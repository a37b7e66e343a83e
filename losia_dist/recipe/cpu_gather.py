"""FSDP2's all-gather on the CPU, without the second copy that gloo makes of what it gathers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.ranks.compat import all_gather_flat

_SMALL = 1 << 20  # bytes, below which one call is quicker than one for each rank


class InPlaceAllGather:
    """What `FSDPModule.set_custom_all_gather` takes. Each rank's part is broadcast into its place in the output.

    gloo's own all-gather fills a buffer of the output's size and copies it: a 7B's output layer takes 1.1 GB of memory more on
    every rank, and several times as long. The values are the same bits.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """Gather input [k] of every rank into output [ranks * k], of which the input may be this rank's part. Called by all
        ranks of the group; returns when it is done."""
        if output_tensor.nbytes < _SMALL:
            all_gather_flat(output_tensor, input_tensor, group=group)
            return
        parts = output_tensor.view(group.size(), -1)
        mine = parts[group.rank()]
        if mine.data_ptr() != input_tensor.data_ptr():
            mine.copy_(input_tensor)
        for rank, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=rank)
