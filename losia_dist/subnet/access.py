"""What subnets are cut with: blocks of parameters, wherever an engine keeps them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from losia_dist.subnet.layout import Layout, Places


class BlockAccess(Protocol):
    """The part of `sharding.interface.ParameterAccess` that subnets are cut with."""

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter as it is stored."""
        ...

    def dtype(self, parameter: Tensor) -> torch.dtype:
        """Of a parameter's values."""
        ...

    def read_block(self, weight: Tensor, places: Places) -> Tensor:
        """weight[places], in the shape they broadcast to and the weight's dtype, on every rank; called by all of them."""
        ...

    def write_block(self, weight: Tensor, places: Places, values: Tensor) -> None:
        """weight[places] = values; called by all ranks."""
        ...


class Held(Protocol):
    """A weight and how it stores its matrices: a `Site`, or what is about to become one."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def layout(self) -> Layout: ...


def whole_shape(access: BlockAccess, held: Held) -> tuple[int, int]:
    """(m, n) of one whole matrix, however it is stored or sharded."""
    return held.layout.matrix_shape(access.shape(held.weight))


def read_subnet(access: BlockAccess, held: Held, rows: Tensor, columns: Tensor) -> Tensor:
    """W[R][:, C], contiguous in the weight's dtype, on every rank; called by all of them.

    rows int64 [r] and columns [c] -> [r, c]; of experts [X, r] and [X, c] -> [X, r, c].
    """
    return access.read_block(held.weight, _places(access, held, rows, columns)).contiguous()


def write_back(access: BlockAccess, held: Held, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """W[R][:, C] = values ([r, c] or [X, r, c]), into whatever part of the weight each rank keeps; called by all ranks."""
    access.write_block(held.weight, _places(access, held, rows, columns), values)


def _places(access: BlockAccess, held: Held, rows: Tensor, columns: Tensor) -> Places:
    return held.layout.places(access.shape(held.weight), rows, columns)
