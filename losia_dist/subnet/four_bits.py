"""bitsandbytes' 4 bits, to and from values, of weights of any size: it counts the values of a call in 32 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 2**30  # values of one call; whole blocks and bytes


def dequantize_4bit(
    packed: Tensor, scales: Tensor, block: int, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Values of bitsandbytes' codes, of any shape: packed uint8 [values / 2, 1], scales fp32 of blocks of successive values."""
    # In one row: where rows are no multiple of the block, bitsandbytes' CPU kernel takes other blocks than it made
    # (findings/bitsandbytes_cpu_rows_and_blocks.sh).
    of_piece = torch.ops.bitsandbytes.dequantize_4bit
    count = math.prod(shape)
    if count <= _AT_ONCE:
        return of_piece(packed, scales, block, kind, [count], dtype).view(shape)  # type: ignore[no-any-return]
    values = torch.empty(count, dtype=dtype, device=packed.device)
    for start, stop in _pieces(count):
        parts = packed[start // 2 : -(-stop // 2)], scales[start // block : -(-stop // block)]
        values[start:stop] = of_piece(*parts, block, kind, [stop - start], dtype)
    return values.view(shape)


def quantize_4bit(
    values: Tensor, kind: str, *, double: bool, storage: torch.dtype = torch.uint8, block: int = 64
) -> tuple[Tensor, Any]:
    """bitsandbytes' own quantization: codes [n, 1] in the storage's dtype, and its `QuantState`, on the values' device.

    kind: "nf4" or "fp4". double: scales are quantized too. block: values that share a scale.
    """
    from bitsandbytes import functional

    values = values.contiguous()
    if values.numel() <= _AT_ONCE:
        settings: dict[str, Any] = {"quant_type": kind, "quant_storage": storage, "blocksize": block}
        return functional.quantize_4bit(values, compress_statistics=double, **settings)  # type: ignore[no-any-return]
    flat = values.view(-1)
    made = [
        torch.ops.bitsandbytes.quantize_4bit(flat[start:stop], block, kind, torch.uint8)
        for start, stop in _pieces(flat.numel())
    ]
    codes, scales = (torch.cat(parts) for parts in zip(*made, strict=True))
    state = functional.QuantState(
        scales, values.shape, functional.get_4bit_type(kind, values.device), block, kind, values.dtype
    )
    if double:
        state.offset, state.nested = scales.mean(), True
        state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=256)
    return codes.view(-1).view(storage).unsqueeze(1), state


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(count, start + _AT_ONCE)) for start in range(0, count, _AT_ONCE))
