"""A rank's block of rows, where the matrices of several experts lie under each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowBlock:
    """Rows [start, stop) of X matrices [m, n] under each other.

    size: m. count: X.
    """

    size: int
    count: int
    start: int
    stop: int

    def pieces(self) -> Iterator[tuple[int, slice, slice]]:
        """For each matrix that the block has rows of: its place among the X, these rows in the block, and in the matrix."""
        for place in range(self.start // self.size, -(-self.stop // self.size)):
            first, last = max(self.start, place * self.size), min(self.stop, (place + 1) * self.size)
            if first < last:
                above = place * self.size
                yield place, slice(first - self.start, last - self.start), slice(first - above, last - above)

    def take(self, matrices: Tensor) -> tuple[Tensor, bool]:
        """The block's rows of [m, n] or [X, m, n], and whether they are a view. What a transposed view gives is a copy of these
        rows' matrices alone."""
        if matrices.dim() == 2:
            return matrices[self.start : self.stop], True
        if matrices.is_contiguous():
            return matrices.view(-1, matrices.shape[-1])[self.start : self.stop], True
        found = [matrices[place, inside] for place, _, inside in self.pieces()]
        return torch.cat(found) if found else matrices.new_zeros(0, matrices.shape[-1]), False

    def of_each(self, rows: Tensor, fact: Callable[[Tensor], Tensor]) -> Tensor:
        """int32 [X]: a fact (bool []) about each matrix's rows in this block; 0 for those that have none here.

        rows: the block, [stop - start, n].
        """
        found = torch.zeros(self.count, dtype=torch.int32, device=rows.device)
        for place, here, _ in self.pieces():
            found[place] = fact(rows[here])
        return found

    def by_row(self, values: Tensor) -> Tensor:
        """A value [X] of each matrix, for each row of the block: [stop - start]."""
        owners = torch.arange(self.start, self.stop, device=values.device) // self.size
        return values[owners]
