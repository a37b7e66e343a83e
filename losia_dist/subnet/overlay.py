"""`Overlay`: what subnets left in a quantized weight, beside its codes, as small differences in few bits each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from losia_dist.errors import ConfigError
from losia_dist.subnet.blocks import take_subnet, write_subnet
from losia_dist.subnet.differences import Differences, Left
from losia_dist.subnet.four_bits import dequantize_4bit

BLOCK = 64  # values that share a scale, in NF4


class Overlay(Differences):
    """The differences between a weight and its codes' values, in the order in which subnets left them.

    Args:
        shape: (m, n) of the weight.
        form: how a difference is stored: "nf4" (0.53 bytes), "int8" with a scale a row, "bf16" or "fp32".
    """

    def __init__(self, shape: tuple[int, int], form: str) -> None:
        super().__init__()
        self.shape, self.form = shape, form

    def add(self, rows: Tensor, columns: Tensor, difference: Tensor) -> None:
        """Keep a difference [r, c], fp32. Differences that take more than one of the whole weight would become that one."""
        m, n = self.shape
        all_rows, all_columns = rows.numel() == m, columns.numel() == n
        codes, scales = ENCODE[self.form](difference)
        self.append(Left(None if all_rows else rows.clone(), None if all_columns else columns.clone(), codes, scales))
        if len(self) > 1 and self.whole_bytes > whole_size(self.form, self.shape):
            whole = self.add_to(torch.zeros(m, n, dtype=torch.float32, device=difference.device))
            self.write([Left(None, None, *ENCODE[self.form](whole))])

    def add_to(self, matrix: Tensor) -> Tensor:
        """matrix [m, n] += all differences, in place; returns it."""
        for one in self.read():
            rows, columns = (None if index is None else index.to(matrix.device) for index in (one.rows, one.columns))
            difference = self._decode(one, matrix)
            if rows is None and columns is None:
                matrix += difference
            elif rows is not None and columns is None:
                matrix.index_add_(0, rows, difference)
            elif rows is None and columns is not None:
                matrix.index_add_(1, columns, difference)
            else:
                write_subnet(matrix, take_subnet(matrix, rows, columns) + difference, rows, columns)
        return matrix

    def add_to_block(self, block: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """What `add_to` would make of matrix[R][:, C], given as block [r, c], in place. rows and columns are sorted."""
        for one in self.read():
            difference = self._decode(one, block)
            found = [_find(index, wanted) for index, wanted in ((one.rows, rows), (one.columns, columns))]
            for dimension, (place, _) in enumerate(found):
                difference = difference.index_select(dimension, place)
            inside = found[0][1].unsqueeze(1) & found[1][1].unsqueeze(0)
            block += difference.masked_fill_(~inside, 0)
        return block

    def _decode(self, one: Left, like: Tensor) -> Tensor:
        m, n = self.shape
        shape = (m if one.rows is None else one.rows.numel(), n if one.columns is None else one.columns.numel())
        return DECODE[self.form](one.codes.to(like.device), one.scales.to(like.device), shape, like.dtype)


def check_form(form: str) -> None:
    """Raises: ConfigError: what this form needs is not installed."""
    if form == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "retired='nf4' needs bitsandbytes: pip install bitsandbytes, or set retired: int8 (twice the memory)."
            ) from error


def _find(index: Tensor | None, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted number stands in a sorted index (None: every number at its own place), and whether it does."""
    if index is None:
        return wanted, torch.ones_like(wanted, dtype=torch.bool)
    index = index.to(wanted.device)
    place = torch.searchsorted(index, wanted).clamp_(max=index.numel() - 1)
    return place, index[place] == wanted


def _encode_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(values.contiguous(), BLOCK, "nf4", torch.uint8)
    return codes.view(-1), scales.to(torch.bfloat16)


def _decode_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return dequantize_4bit(codes.unsqueeze(1), scales.to(torch.float32), BLOCK, "nf4", shape, dtype)


def _encode_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    scales = values.abs().amax(-1, keepdim=True) / 127
    return (values / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8), scales


def _decode_int8(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (codes * scales).to(dtype)


def _decode_float(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return codes.to(dtype)


ENCODE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "nf4": _encode_nf4,
    "int8": _encode_int8,
    "bf16": lambda values: (values.to(torch.bfloat16), values.new_empty(0)),
    "fp32": lambda values: (values, values.new_empty(0)),
}
DECODE: dict[str, Callable[[Tensor, Tensor, tuple[int, ...], torch.dtype], Tensor]] = {
    "nf4": _decode_nf4,
    "int8": _decode_int8,
    "bf16": _decode_float,
    "fp32": _decode_float,
}


def whole_size(form: str, shape: tuple[int, ...]) -> float:
    """Bytes of one difference of a whole weight."""
    values = math.prod(shape)
    rows = values // shape[-1]
    return {"nf4": values * (0.5 + 2 / BLOCK), "int8": values + 4 * rows, "bf16": 2 * values, "fp32": 4 * values}[form]
