"""`Placement`: where the subnets stand. Indices, values and master values change here, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.errors import ConfigError
from losia_dist.guard import any_rank
from losia_dist.localization.slots import Wanted
from losia_dist.sharding.interface import ParameterAccess, StateAccess
from losia_dist.subnet.drawn import draw_subnet
from losia_dist.subnet.kinds import read_subnet, whole_shape, write_back
from losia_dist.subnet.linear import SubnetLinear


class Placement:
    """Cuts subnets out of their weights and writes them back, through whatever engine holds both.

    Everything is called by all ranks, in the same order.

    Args:
        layers: all layers with a subnet.
        parameters: access to the model's parameters, of `resolve_parameters`.
        state: access to the optimizer's state, of `resolve_state`.
    """

    def __init__(self, layers: list[SubnetLinear], parameters: ParameterAccess, state: StateAccess) -> None:
        self.layers, self.parameters, self.state = layers, parameters, state

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

    def cut_awaited(self, seed: int, group: dist.ProcessGroup | None) -> None:
        """Cut the first subnets of a model that was converted on the meta device, now that its weights were loaded.

        Where one rank alone had the weights (the others receive them from it), all ranks cut again, to the same values.

        Raises:
            ConfigError: the model is still on the meta device. Same on every rank.
        """
        if not any_rank(any(layer.awaits_weights for layer in self.layers), group):
            return
        if any_rank(any(p.device.type == "meta" for layer in self.layers for p in (layer.weight, layer.row_index)), group):
            raise ConfigError(
                "the model is still on the meta device: after get_losia_model (and fully_shard) call "
                "model.to_empty(device=...) and load the weights, then build the optimizer and LoSiA(...)."
            )
        for layer in self.layers:
            size, device = (layer.row_index.numel(), layer.col_index.numel()), layer.row_index.device
            rows, columns = draw_subnet(layer.name, self.shape(layer), size, seed)
            self.cut(layer, rows.to(device), columns.to(device))
            layer.awaits_weights = False
