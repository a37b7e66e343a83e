"""dS = dy[:, R]^T x[:, C] as one Triton kernel that gathers dy's columns as it reads them, and sums in fp32.

Imports Triton: ask `switch.is_on` first. Not timed until a GPU has run it. The reference is the function of the same name in
`losia_dist.subnet.blocks`. Dimensions in names: t tokens, m output neurons, r and c rows and columns of the subnet.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from losia_dist.kernels.switch import is_interpreted

MAX_PARTS = 16  # of the token axis: partial sums then take at most this many times the subnet, in fp32


def _configs() -> list[Any]:
    """Tiles for Hopper and Ampere; one small one in the interpreter, which has nothing to time."""
    if is_interpreted():
        return [triton.Config({"BLOCK_R": 16, "BLOCK_C": 32, "BLOCK_T": 16})]
    tiles = [(128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (64, 64, 32, 4, 4)]
    return [
        triton.Config({"BLOCK_R": r, "BLOCK_C": c, "BLOCK_T": t}, num_warps=warps, num_stages=stages)
        for r, c, t, warps, stages in tiles
    ]


# Not by the number of tokens, which changes from batch to batch: timing would never end.
@triton.autotune(configs=_configs(), key=["r", "c", "parts"])
@triton.jit
def _gradient(  # type: ignore[no-untyped-def]  # Triton reads annotations its own way
    grad_y,
    kept,
    rows,
    sums,
    t,
    r,
    c,
    parts,
    grad_token,
    grad_row,
    kept_token,
    kept_column,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    column_blocks = tl.cdiv(c, BLOCK_C)
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = (block // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (block % column_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = i < r, j < c
    row = i if ALL_ROWS else tl.load(rows + i, mask=in_rows, other=0)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    # Parts take turns, a block of tokens each, so that they end together.
    for start in range(part * BLOCK_T, t, parts * BLOCK_T):
        token = start + tl.arange(0, BLOCK_T).to(tl.int64)
        in_tokens = token < t
        dy = tl.load(
            grad_y + row[:, None] * grad_row + token[None, :] * grad_token,
            mask=in_rows[:, None] & in_tokens[None, :],
            other=0.0,
        )
        x = tl.load(
            kept + token[:, None] * kept_token + j[None, :] * kept_column,
            mask=in_tokens[:, None] & in_columns[None, :],
            other=0.0,
        )
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        total = tl.dot(dy, x, total, input_precision=PRECISION)
    place = sums + part * r * c + i[:, None] * c + j[None, :]
    tl.store(place, total, mask=in_rows[:, None] & in_columns[None, :])


@torch.no_grad()
def subnet_gradient(grad_y: Tensor, kept: Tensor, rows: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """dS = dy[:, R]^T x[:, C] (paper section 3.4): [r, c], summed in fp32 whatever the operands are. Nothing is waited for.

    grad_y [t, m] and kept = x[:, C], [t, c], of one floating dtype, strided; rows int64 [r], contiguous; None: all. All on
    one device.

    Args:
        dtype: of the result; None: that of grad_y. A fp32 subnet under bf16 operands so gets what the sum has, unrounded.
    """
    t, c = kept.shape
    r = grad_y.shape[1] if rows is None else rows.numel()
    dtype = grad_y.dtype if dtype is None else dtype
    if 0 in (t, r, c):
        return torch.zeros((r, c), dtype=dtype, device=grad_y.device)
    parts = _parts(t, r, c, grad_y.device)
    sums = torch.empty((parts, r, c), dtype=torch.float32, device=grad_y.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(r, meta["BLOCK_R"]) * triton.cdiv(c, meta["BLOCK_C"]), parts

    _gradient[grid](
        grad_y,
        kept,
        sums if rows is None else rows,  # a pointer that is not read
        sums,
        t,
        r,
        c,
        parts,
        *grad_y.stride(),
        *kept.stride(),
        ALL_ROWS=rows is None,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        UPCAST=is_interpreted(),  # which has no bf16 products; the numbers are the same
    )
    return (sums[0] if parts == 1 else sums.sum(0)).to(dtype)


def _parts(t: int, r: int, c: int, device: torch.device) -> int:
    """Parts of the token axis, so that few tiles keep every multiprocessor busy too; their sums are added in a fixed order."""
    tiles = triton.cdiv(r, 128) * triton.cdiv(c, 128)
    return max(1, min(MAX_PARTS, _multiprocessors(device) // tiles, triton.cdiv(t, 256)))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
