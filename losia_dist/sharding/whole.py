"""Parameters that every rank keeps whole: one process, DDP, ZeRO stages 0, 1 and 2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from losia_dist.subnet.layout import Places
from losia_dist.subnet.packed import as_integers


class WholeParameters:
    """`ParameterAccess` where nothing is sharded; no communication."""

    weight_is_resident = True

    def reshard(self) -> None:
        """Nothing to do: parameters keep their places between steps."""

    def without_reduction(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    @torch.no_grad()
    def read_block(self, weight: Tensor, places: Places) -> Tensor:
        return weight.data[places]

    @torch.no_grad()
    def write_block(self, weight: Tensor, places: Places, values: Tensor) -> None:
        weight.data[places] = values.to(weight.dtype)

    @torch.no_grad()
    def read_bits(self, weight: Tensor, places: Places) -> Tensor:
        return as_integers(weight.data)[places].to(torch.int64)

    @torch.no_grad()
    def write_bits(self, weight: Tensor, places: Places, bits: Tensor) -> None:
        stored = as_integers(weight.data)
        stored[places] = bits.to(stored.dtype)

    def shares(self, parameter: Tensor) -> None:
        return None

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return parameter.dtype

    def read_whole(self, parameter: Tensor) -> Tensor:
        return parameter.detach().clone()

    @torch.no_grad()
    def write_whole(self, parameter: Tensor, values: Tensor) -> None:
        parameter.copy_(values)  # not through .data: a version that goes up tells the layer to write it again
