"""The loss of a whole sequence, of which each rank has computed a part (sequence parallelism)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceSum(torch.autograd.Function):
    """The sum of a tensor over the ranks of a group, which gradients go back through: each rank gets the sum of all of theirs.

    Where all ranks go on alike from the sum, the gradient that each gets is the group's size times that of the sum. The mean
    over the ranks, which LoSiA has every engine take, is then the gradient of the whole sequence.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.detach().clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


def sum_over_sequence(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of a part's loss [] over the ranks that share a sequence, equal on all of them. None: this rank has it all."""
    if group is None:
        return part
    whole: Tensor = SequenceSum.apply(part, group)
    return whole


def sequence_loss(loss: Tensor, shift_labels: Tensor, group: dist.ProcessGroup, ignore_index: int = -100) -> Tensor:
    """The mean loss [] over the target tokens of whole sequences, from each rank's mean over those of its part.

    Called by all ranks of the group, with parts of the same sequences; equal on all of them. Sends two numbers.

    Args:
        loss: fp32 [], this rank's mean over its own targets; whatever it is where there are none.
        shift_labels: int64 [B, L / ranks], the target of each of this rank's tokens.
        group: the ranks that share each sequence.
    """
    targets = (shift_labels != ignore_index).sum().to(loss.dtype)
    total = targets.clone()
    dist.all_reduce(total, group=group)
    part = torch.where(targets > 0, loss, torch.zeros_like(loss)) * targets
    return sum_over_sequence(part, group) / total.clamp(min=1)
