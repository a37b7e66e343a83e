"""`Placement`: where the subnets stand. Indices, values and master values change here, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.localization.slots import Wanted
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.parts import RunParts
from losia_dist.subnet.access import read_subnet, write_back
from losia_dist.subnet.drawn import Draw
from losia_dist.subnet.site import Site


class Placement:
    """Cuts subnets out of their weights and writes them back, through whatever engine holds both.

    Everything is called by all ranks, in the same order.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: RunParts) -> None:
        self.sites, self.parameters, self.state = parts.sites, parts.parameters, parts.state

    @torch.no_grad()
    def cut(self, site: Site, rows: Tensor, columns: Tensor) -> Tensor:
        """Place a subnet (or those of experts); its values, in the model and in the optimizer, become those that the weight
        has there: [r, c] or [X, r, c].
        """
        site.row_index.copy_(rows)
        site.col_index.copy_(columns)
        values = read_subnet(self.parameters, site, rows, columns)
        self.parameters.write_whole(site.subnet, values)
        self.state.write_master(site.subnet, values.to(torch.float32))
        return values

    def write_back(self, site: Site) -> Tensor:
        """Make every shard of the weight hold the subnet's present values; returns them, [r, c] or [X, r, c]."""
        values = self.parameters.read_whole(site.subnet)
        write_back(self.parameters, site, site.row_index, site.col_index, values)
        return values

    def write_all_back(self) -> None:
        """`write_back` of every subnet; codes stay: whoever reads a quantized weight whole reads the subnet in it."""
        for site in self.sites:
            if site.packed is None:
                self.write_back(site)

    def wanted(self, site: Site, step: int, outliers: Mapping[str, Sequence[int]]) -> Wanted:
        """What is asked for where the layer is to get another subnet after `step` optimizer steps.

        outliers: columns that are not drawn, by layer or expert.
        """
        return Wanted(site.matrix_names, step, site.shape, (site.row_index, site.col_index), outliers, site.held)

    def cut_awaited(self, config: LoSiAConfig, agreement: Agreement) -> None:
        """Cut the first subnets of a model that was converted on the meta device, now that its weights were loaded.

        Where one rank alone had the weights (the others receive them from it), all ranks cut again, to the same values.

        Raises:
            ConfigError: the model is still on the meta device. Same on every rank.
        """
        if not agreement.any(any(site.awaits_weights for site in self.sites)):
            return
        if agreement.any(any(p.device.type == "meta" for site in self.sites for p in (site.weight, site.row_index))):
            raise ConfigError(
                "the model is still on the meta device: after get_losia_model (and fully_shard) call "
                "model.to_empty(device=...) and load the weights, then build the optimizer and LoSiA(...)."
            )
        draw = Draw.of(config)
        for site in self.sites:
            rows, columns = draw.subnets(site.matrix_names, site.shape, site.subnet_shape, linear=site.is_linear)
            device, shapes = site.row_index.device, (site.row_index.shape, site.col_index.shape)
            self.cut(site, rows.view(shapes[0]).to(device), columns.view(shapes[1]).to(device))
            site.awaits_weights = False
