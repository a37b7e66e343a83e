"""Which linear layers read the same input, as the first forward pass shows: those that are located on the same columns.

That a module holds them and that their inputs are of one width is not enough: an attention's output layer often is as wide as
q, k and v, and reads something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from losia_dist.subnet.convert import group_names
from losia_dist.subnet.shared_inputs import families, same_tensor
from losia_dist.subnet.site import Site


class InputReaders:
    """Watches the first call of each layer. Layers that are called in turn with the same tensor read the same input.

    sites: of the run. share_columns: of `Located`; if false, no layer shares with another, and none is watched.
    largest: elementwise maximum over all ranks, of a tensor of integers.
    """

    def __init__(self, sites: Sequence[Site], share_columns: bool, largest: Callable[[Tensor], Tensor]) -> None:
        self._share_columns, self._largest = share_columns, largest
        self._firsts: dict[Site, Site] = {}  # layer -> the first one of its family that was called with the same tensor
        self._latest: tuple[Tensor, int, dict[int, Site]] | None = None  # x, its version, the first layer of each family
        self._watched: list[Site] = []
        for name in group_names(sites):
            for family in self._candidates([site for site in sites if site.group_name == name]):
                if family[0].is_tiled:  # an MLP that is watched is not computed in tiles; its first layers read one input
                    continue
                self._watched += family
                for site in family:
                    site.input_sink = partial(self._see, family, site)
        self.watches = bool(self._watched)

    def families(self, sites: Sequence[Site]) -> list[list[Site]]:
        """The layers of one group: those that share columns together, each other site by itself, as their first ones come.

        Called by all ranks, with equal results: a rank need not have seen every layer called. One number is sent for each layer
        that may share, and the host waits for it. Layers that no rank has seen called count as readers of the first's input.
        """
        candidates = self._candidates(sites)
        if not candidates:
            return [[site] for site in sites]
        mine = [self._place(site, family) for family in candidates for site in family]
        agreed = self._largest(torch.tensor(mine, device=sites[0].row_index.device)).clamp_(min=0).tolist()
        places = dict(zip((site for family in candidates for site in family), agreed, strict=True))
        first_of = {site: family[places[site]] for family in candidates for site in family}
        found: dict[Site, list[Site]] = {}
        for site in sites:
            found.setdefault(first_of.get(site, site), []).append(site)
        return list(found.values())

    def forget(self) -> None:
        """Let go of the input that is held."""
        self._latest = None

    def remove(self) -> None:
        """Take this off the layers."""
        self.forget()
        for site in self._watched:
            site.input_sink = None

    def _candidates(self, sites: Sequence[Site]) -> list[list[Site]]:
        return [family for family in families(sites, self._share_columns) if len(family) > 1]

    def _place(self, site: Site, family: list[Site]) -> int:
        return family.index(self._firsts[site]) if site in self._firsts else -1

    def _see(self, family: list[Site], site: Site, x: Tensor, _: int) -> None:
        """Called in forward."""
        if x.is_inference():  # evaluation; such tensors have no version
            return
        site.input_sink = None
        if self._latest is None or not same_tensor(self._latest[0], x, self._latest[1]):
            # Its storage is held, so that no other input can lie there; not its graph.
            self._latest = (x.detach(), x._version, {})
        self._firsts[site] = self._latest[2].setdefault(id(family), site)
