"""weight[R][:, C] = subnet as one Triton kernel: no index grid, no cast copy. Imports Triton: ask `switch.is_on` first.

Not timed until a GPU has run it. The reference is the function of the same name in `losia_dist.subnet.blocks`.
Dimensions in names: m output neurons, n input neurons, r and c rows and columns of the subnet; i and j run over r and c.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R, BLOCK_C = 8, 256  # long in the direction in which neighbours share cache lines


@triton.jit
def _write(  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    weight,
    subnet,
    rows,
    columns,
    r,
    c,
    weight_row,
    weight_column,
    subnet_row,
    subnet_column,
    ALL_ROWS: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # int64 throughout: m * n passes 2^31 in an output layer of 256 k words by 8,192.
    column_blocks = tl.cdiv(c, BLOCK_C)
    block = tl.program_id(0)
    i = (block // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (block % column_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = i < r, j < c
    row = i if ALL_ROWS else tl.load(rows + i, mask=in_rows, other=0)
    column = j if ALL_COLUMNS else tl.load(columns + j, mask=in_columns, other=0)
    inside = in_rows[:, None] & in_columns[None, :]
    values = tl.load(subnet + i[:, None] * subnet_row + j[None, :] * subnet_column, mask=inside)
    values = values.to(weight.dtype.element_ty)
    tl.store(weight + row[:, None] * weight_row + column[None, :] * weight_column, values, mask=inside)


@torch.no_grad()
def write_subnet(weight: Tensor, subnet: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """weight[R][:, C] = subnet, in place and unseen by autograd. Nothing is waited for.

    weight [m, n] whole, strided (a transposed view will do); subnet [r, c] of any floating dtype, strided; rows int64 [r],
    columns int64 [c], each contiguous, without repetitions; None stands for all. All on one device.
    """
    if weight.stride(0) < weight.stride(1):  # stored the other way round: let blocks be long in the direction of memory
        weight, subnet, rows, columns = weight.t(), subnet.t(), columns, rows
    r, c = subnet.shape
    if r == 0 or c == 0:
        return
    grid = (triton.cdiv(r, BLOCK_R) * triton.cdiv(c, BLOCK_C),)
    _write[grid](
        weight.detach(),
        subnet.detach(),
        weight if rows is None else rows,  # a pointer that is not read
        weight if columns is None else columns,
        r,
        c,
        *weight.stride(),
        *subnet.stride(),
        ALL_ROWS=rows is None,
        ALL_COLUMNS=columns is None,
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
