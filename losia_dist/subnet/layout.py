"""`Layout`: how a parameter stores the matrix, or the matrices, that subnets are cut from.

Everywhere in this package rows are output neurons (m) and columns are input neurons (n). `nn.Linear` stores [m, n];
Transformers' `Conv1D` (GPT-2) stores [n, m]. Experts are stored as [E, m, n] or [E, n, m], or under each other in two
dimensions (DBRX: [E m, n]). The differences are known here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# One int64 index for each dimension of a parameter as it is stored; together they broadcast to a block's [r, c] or [X, r, c].
Places = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """How a parameter stores its matrices, and which of them are meant.

    Attributes:
        transposed: each matrix is stored [n, m].
        experts: the experts [start, stop) of a weight that holds several; None: the parameter is one matrix.
        stacked: how many experts lie under each other in the first of two dimensions; 0: they have a dimension of their own.
    """

    transposed: bool = False
    experts: tuple[int, int] | None = None
    stacked: int = 0

    @property
    def count(self) -> int:
        """X: matrices that are meant."""
        return 1 if self.experts is None else self.experts[1] - self.experts[0]

    def matrix_shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(m, n) of one matrix of a parameter of this whole shape."""
        first, second = stored[-2], stored[-1]
        if self.stacked:
            first //= self.stacked
        return (second, first) if self.transposed else (first, second)

    def number_of_experts(self, stored: tuple[int, ...]) -> int:
        """E of a parameter of this whole shape."""
        return self.stacked or stored[0]

    def places(self, stored: tuple[int, ...], rows: Tensor, columns: Tensor) -> Places:
        """Where the elements rows x columns lie in a parameter of this whole shape.

        rows int64 [r] and columns [c] of one matrix, or [X, r] and [X, c] of the experts that are meant.
        """
        row, column = rows.unsqueeze(-1), columns.unsqueeze(-2)
        first, second = (column, row) if self.transposed else (row, column)
        if self.experts is None:
            return first, second
        expert = torch.arange(*self.experts, device=rows.device).view(-1, 1, 1)
        if self.stacked:
            return expert * (stored[0] // self.stacked) + first, second
        return expert, first, second

    def matrices(self, weight: Tensor) -> Tensor:
        """The matrices of a whole weight with output neurons first, [m, n] or [X, m, n]: the weight itself, or a view."""
        if self.stacked:
            weight = weight.view(self.stacked, weight.shape[0] // self.stacked, weight.shape[1])
        if self.experts is not None and self.experts != (0, weight.shape[0]):
            weight = weight[self.experts[0] : self.experts[1]]
        return weight.transpose(-2, -1) if self.transposed else weight


ONE_MATRIX = Layout()
