"""What changed in the frozen weights since the last save: where subnets were that moved on, and what they left there.

While training runs only the places are kept; a save reads the values from the weights. Where a later subnet came to lie over
an earlier one, the weight holds the newer value, and that is the one to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from losia_dist.run.conductor import LoSiA
from losia_dist.sharding.interface import ParameterAccess
from losia_dist.subnet.access import read_subnet
from losia_dist.subnet.site import Site


class Moved:
    """Places that subnets have left, by layer: rows [r] and columns [c] (of experts [X, r] and [X, c]), int32 in host memory,
    the same on every rank.

    Once a layer's places have as many elements as its weight, the whole weight stands for them: what a run holds that never
    saves does not grow on.
    """

    def __init__(self) -> None:
        self._places: dict[Site, list[tuple[Tensor, Tensor]]] = {}
        self._whole: dict[Site, None] = {}  # an ordered set: all ranks go through it alike

    def add(self, site: Site) -> None:
        """Note that a subnet leaves where it is. Waits for the device."""
        if site in self._whole:
            return
        places = self._places.setdefault(site, [])
        rows, columns = (index.detach().to("cpu", torch.int32, copy=True) for index in (site.row_index, site.col_index))
        places.append((rows, columns))
        if len(places) * site.subnet_size >= site.size:
            del self._places[site]
            self._whole[site] = None

    def update(self, other: Moved) -> None:
        """Add what another one holds."""
        self._whole.update(other._whole)
        for site, places in other._places.items():
            self._places.setdefault(site, []).extend(places)

    def __iter__(self) -> Iterator[tuple[Site, Tensor | None, Tensor | None]]:
        """(layer, rows, columns) of each place; None, None for a whole weight."""
        for site in self._whole:
            yield site, None, None
        for site, places in self._places.items():
            if site not in self._whole:
                for rows, columns in places:
                    yield site, rows, columns


def watch(losia: LoSiA, listeners: Callable[[], list[Moved]]) -> None:
    """From here on every subnet that moves on is noted in all that `listeners` gives at that time."""

    def retire(site: Site, values: Tensor) -> None:
        for moved in listeners():
            if site.packed is None:  # what it leaves is not in the weight
                moved.add(site)

    losia.on_retire.append(retire)


@torch.no_grad()
def read_blocks(moved: Moved, access: ParameterAccess, rank: int, world_size: int) -> dict[str, Tensor]:
    """This rank's share of what the weights hold in the places, as a journal file has it. Called by all ranks, after `settle`.

    "<number>/<site>/rows" int64 [r], ".../columns" int64 [c] and ".../values" [r, c] in the weight's dtype, in host memory; of
    experts [X, r], [X, c] and [X, r, c]. One place is read at a time, on all ranks; they are dealt out to the ranks in turn,
    to share the memory.
    """
    found: dict[str, Tensor] = {}
    for turn, (site, rows, columns) in enumerate(moved):
        if rows is None or columns is None:
            values = site.as_rows(access.read_whole(site.weight))
            every = (torch.arange(size) for size in site.shape)
            rows, columns = (index.expand(*values.shape[:-2], -1).contiguous() for index in every)
        else:
            rows, columns = rows.long(), columns.long()
            device = site.row_index.device
            values = read_subnet(access, site, rows.to(device), columns.to(device))
        if turn % world_size == rank:
            parts = {"rows": rows, "columns": columns, "values": values.to("cpu", copy=True).contiguous()}
            found |= {f"{turn}/{site.name}/{name}": tensor for name, tensor in parts.items()}
    return found
