"""What the subnet linear does to memory: write a subnet into its weight, take parts of matrices, form its gradient.

Dimensions in names: m output neurons, n input neurons, r and c rows and columns of the subnet, t tokens. Indices are sorted,
so that neighbouring reads share cache lines; None stands for all rows or all columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def write_subnet(weight: Tensor, subnet: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """weight[R][:, C] = subnet, in place and unseen by autograd.

    weight [m, n] whole (a transposed view will do), subnet [r, c] of any floating dtype, rows int64 [r], columns int64 [c];
    None stands for all.
    """
    target, values = weight.data, subnet.data.to(weight.dtype)
    if rows is not None and columns is not None:
        target.index_put_((rows[:, None], columns[None, :]), values)
    elif rows is not None:
        target.index_copy_(0, rows, values)
    elif columns is not None:
        target.index_copy_(1, columns, values)
    else:
        target.copy_(values)


def take_subnet(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """matrix[R][:, C] for a whole [m, n] matrix; None stands for all. A copy, unless both are None."""
    if rows is not None:
        matrix = matrix.index_select(0, rows)
    if columns is not None:
        matrix = matrix.index_select(1, columns)
    return matrix


def take_last(matrix: Tensor, index: Tensor | None) -> Tensor:
    """matrix[..., index], contiguous; the matrix itself for None. matrix [..., k], index int64."""
    if index is None:
        return matrix
    if matrix.device.type == "cpu":
        # On the CPU index_select along the last dimension is two to five times slower than gather, and gather in three
        # dimensions up to twice as slow as in two.
        flat = matrix.reshape(-1, matrix.shape[-1])
        return torch.gather(flat, 1, index.expand(flat.shape[0], -1)).view(*matrix.shape[:-1], index.shape[0])
    return matrix.index_select(-1, index)


def subnet_gradient(grad_y: Tensor, kept: Tensor, rows: Tensor | None) -> Tensor:
    """dS = dy[..., R]^T x[..., C] (paper section 3.4): [r, c] in the dtype of grad_y.

    grad_y [t, m]; kept = x[..., C], [t, c].
    """
    if rows is None:
        # The same product, with the many rows of dy as its right side: up to twice as fast on the CPU for a few columns.
        return (kept.t() @ grad_y).t().contiguous()
    return take_last(grad_y, rows).t() @ kept
