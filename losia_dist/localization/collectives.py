"""All communication of localization, in one place. Every rank issues the same calls in the same order.

Dimensions: m rows and n columns of a weight, b = ceil(m / world size) rows of a block. With one rank nothing is sent and
the same code is the dense case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.formulas import row_block
from losia_dist.ranks import compat


@dataclass
class Transfer:
    """A collective under way, and what it sends, which must stay until it is over."""

    work: Any
    source: Tensor | None

    def finish(self) -> None:
        """Let later work wait for the collective, and what it sent go. A second call does nothing.

        On NCCL the current stream waits, not the host. What was sent may then be used again: it was allocated on the stream
        that waits, as all layers' backward runs on one stream.
        """
        if self.source is not None:
            self.work.wait()
            self.work = self.source = None


@dataclass
class PendingRows:
    """A reduce-scatter on its way; `wait` gives this rank's rows, averaged over the ranks."""

    block: Tensor
    rows: int
    divisor: int
    transfer: Transfer | None = None

    def wait(self) -> Tensor:
        """This rank's real rows [<= b, n], in the gradient's dtype."""
        if self.transfer is not None:
            self.transfer.finish()
            self.transfer = None
        if self.divisor != 1:
            self.block.div_(self.divisor)
            self.divisor = 1
        return self.block[: self.rows]


class RowCollectives:
    """Reductions of row-sharded matrices over a process group of its own, so that they can run beside the engine's.

    All methods but `rows_of` are called by all ranks of the group. Tensors keep their dtype.

    Args:
        group: process group, passed in and never looked up; None: this process alone.
        divisor: ranks whose mean a gradient is, where each brings the sum over several of them (of experts that are spread over
            ranks); None: those of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, divisor: int | None = None) -> None:
        self.group = group
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.divisor = divisor or self.world_size
        self.rank = 0 if group is None else dist.get_rank(group)
        self._under_way: Transfer | None = None  # the last one that was started

    def rows_of(self, size: int) -> tuple[int, int]:
        """Rows [start, stop) of an m-row matrix that this rank keeps."""
        return row_block(size, self.rank, self.world_size)

    def reduce_scatter_rows(self, matrix: Tensor) -> PendingRows:
        """Start averaging a whole [m, n] matrix over the ranks; each receives its block of rows. Asynchronous.

        One is under way at a time: the one before is waited for first, so that no more than one whole matrix stays with it.
        """
        start, stop = self.rows_of(matrix.shape[0])
        if self.world_size == 1:
            return PendingRows(matrix, stop - start, self.divisor)
        if self._under_way is not None:
            self._under_way.finish()
        block = -(-matrix.shape[0] // self.world_size)
        padded = block * self.world_size
        if padded != matrix.shape[0]:
            matrix = torch.cat([matrix, matrix.new_zeros(padded - matrix.shape[0], matrix.shape[1])])
        received, matrix = matrix.new_empty(block, matrix.shape[1]), matrix.contiguous()
        work = compat.reduce_scatter_flat(received, matrix, group=self.group, async_op=True)
        self._under_way = Transfer(work, matrix)
        return PendingRows(received, stop - start, self.divisor, self._under_way)

    def gather_rows(self, values: Tensor, size: int) -> Tensor:
        """One number per row of this rank's block, [<= b] -> one per row of the whole matrix, [m]: m numbers sent in all.

        size: m.
        """
        if self.world_size == 1:
            return values
        block = -(-size // self.world_size)
        mine = values.new_zeros(block)
        mine[: values.numel()] = values
        whole = values.new_empty(block * self.world_size)
        compat.all_gather_flat(whole, mine, group=self.group)
        return whole[:size]

    def sum_columns(self, values: Tensor) -> Tensor:
        """Column sums [n] of this rank's block -> column sums [n] of the whole matrix, in place: n numbers."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place; values of one shape on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """A vector [k] of the group's rank `source`, on every rank; in place: the others give one to fill, of its dtype."""
        if self.world_size > 1:
            dist.broadcast(values, group=self.group, group_src=source)
        return values

    def stack(self, values: Tensor) -> Tensor:
        """A vector [k] per rank -> [world size, k], the same on every rank."""
        if self.world_size == 1:
            return values.unsqueeze(0)
        whole = values.new_empty(self.world_size * values.numel())
        compat.all_gather_flat(whole, values.contiguous(), group=self.group)
        return whole.view(self.world_size, -1)
