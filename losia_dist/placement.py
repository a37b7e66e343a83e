"""`Placement`: where the subnets stand. Indices, values and master values change here, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from losia_dist.agreement import Agreement
from losia_dist.errors import ConfigError
from losia_dist.localization.slots import Wanted
from losia_dist.parts import RunParts
from losia_dist.subnet.drawn import draw_subnet
from losia_dist.subnet.kinds import read_subnet, whole_shape, write_back
from losia_dist.subnet.linear import SubnetLinear


class Placement:
    """Cuts subnets out of their weights and writes them back, through whatever engine holds both.

    Everything is called by all ranks, in the same order.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: RunParts) -> None:
        self.layers, self.parameters, self.state = parts.layers, parts.parameters, parts.state

    def shape(self, layer: SubnetLinear) -> tuple[int, int]:
        """(m, n) of the whole weight."""
        return whole_shape(self.parameters, layer)

    @torch.no_grad()
    def cut(self, layer: SubnetLinear, rows: Tensor, columns: Tensor) -> Tensor:
        """Place a subnet; its values, in the model and in the optimizer, become those that the weight has there: [r, c]."""
        layer.row_index.copy_(rows)
        layer.col_index.copy_(columns)
        values = read_subnet(self.parameters, layer, rows, columns)
        self.parameters.write_whole(layer.subnet, values)
        self.state.write_master(layer.subnet, values.to(torch.float32))
        return values

    def write_back(self, layer: SubnetLinear) -> Tensor:
        """Make every shard of the weight hold the subnet's present values; returns them, [r, c]."""
        values = self.parameters.read_whole(layer.subnet)
        write_back(self.parameters, layer, layer.row_index, layer.col_index, values)
        return values

    def wanted(self, layer: SubnetLinear, step: int, outliers: Mapping[str, Sequence[int]]) -> Wanted:
        """What is asked for where the layer is to get another subnet after `step` optimizer steps.

        outliers: columns that are not drawn, by layer.
        """
        present = (layer.row_index, layer.col_index)
        return Wanted(layer.name, step, self.shape(layer), present, outliers.get(layer.name, ()))

    def cut_awaited(self, seed: int, agreement: Agreement) -> None:
        """Cut the first subnets of a model that was converted on the meta device, now that its weights were loaded.

        Where one rank alone had the weights (the others receive them from it), all ranks cut again, to the same values.

        Raises:
            ConfigError: the model is still on the meta device. Same on every rank.
        """
        if not agreement.any(any(layer.awaits_weights for layer in self.layers)):
            return
        if agreement.any(any(p.device.type == "meta" for layer in self.layers for p in (layer.weight, layer.row_index))):
            raise ConfigError(
                "the model is still on the meta device: after get_losia_model (and fully_shard) call "
                "model.to_empty(device=...) and load the weights, then build the optimizer and LoSiA(...)."
            )
        for layer in self.layers:
            size, device = (layer.row_index.numel(), layer.col_index.numel()), layer.row_index.device
            rows, columns = draw_subnet(layer.name, self.shape(layer), size, seed)
            self.cut(layer, rows.to(device), columns.to(device))
            layer.awaits_weights = False
