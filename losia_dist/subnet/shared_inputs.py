"""Linear layers that read one input and train the same columns of it take x[..., C] once, and keep it once for backward.

Which layers have the same columns is known from where the subnets stand (`SharedInputs.settle`); that they read the same input
is seen in every forward pass, by the memory of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from losia_dist.subnet.blocks import take_last
from losia_dist.subnet.site import Site


class SharedInputs:
    """The input that was read last, and its columns. At most one of each is held, and only while another layer may want it.

    sites: of the run. share_columns: of its configuration; if false, nothing is shared.
    """

    def __init__(self, sites: Sequence[Site], share_columns: bool) -> None:
        self._families = [family for family in families(sites, share_columns) if len(family) > 1]
        self._peers: dict[Site, tuple[int, int, int]] = {}  # layer -> group, layers in it, version of its columns
        self._x: Tensor | None = None
        self._kept: Tensor | None = None
        self._version = self._group = self._awaited = 0

    @torch.no_grad()
    def settle(self) -> None:
        """Find out which layers have the same columns, after subnets moved. Waits for the device, if any did."""
        self.forget()
        moved = [family for family in self._families if any(not self._is_known(site) for site in family)]
        pairs = [pair for family in moved for pair in combinations(family, 2)]
        if not pairs:
            return
        equal = torch.stack([(one.col_index == other.col_index).all() for one, other in pairs]).tolist()
        same = {pair for pair, is_same in zip(pairs, equal, strict=True) if is_same}
        for family in moved:
            while family:  # of a decoder's attention to an encoder q has columns of its own, k and v have others together
                first, *others = family
                group = [first, *(site for site in others if (first, site) in same)]
                for site in group:
                    self._peers[site] = (id(first), len(group), site.col_index._version)
                    site.take_columns = self.take if len(group) > 1 else None
                family = [site for site in family if site not in group]

    def take(self, site: Site, x: Tensor) -> Tensor:
        """x[..., C] of a layer, contiguous: what a layer of its group has just taken of the same x, or a new tensor."""
        group, count, version = self._peers[site]
        if version != site.col_index._version or x.is_inference():
            return take_last(x, site.columns)
        if self._x is None or self._group != group or not _same(self._x, x) or self._version != x._version:
            # Its storage is held, so that no other input can lie there; not its graph.
            self._x, self._version, self._group = x.detach(), x._version, group
            self._kept, self._awaited = take_last(x, site.columns), count
        kept = self._kept
        assert kept is not None
        self._awaited -= 1
        if self._awaited == 0:
            self.forget()
        return kept

    def forget(self) -> None:
        """Let go of what is held."""
        self._x = self._kept = None

    def remove(self) -> None:
        """Take this off the layers: each gathers for itself."""
        self.forget()
        for site in self._peers:
            site.take_columns = None

    def _is_known(self, site: Site) -> bool:
        return site in self._peers and self._peers[site][2] == site.col_index._version


def families(sites: Sequence[Site], share_columns: bool) -> list[list[Site]]:
    """Linear layers that may read the same input, of one module, one width and as many columns; each other site by itself.

    In the order of each one's first site. share_columns: if false, every site is by itself.
    """
    found: dict[object, list[Site]] = {}
    for site in sites:
        may_share = share_columns and site.is_linear and not site.takes_all_columns
        key = (site.name.rpartition(".")[0], site.shape[1], site.subnet_shape[1]) if may_share else site
        found.setdefault(key, []).append(site)
    return list(found.values())


def _same(known: Tensor, x: Tensor) -> bool:
    return (
        known.data_ptr() == x.data_ptr()
        and known.shape == x.shape
        and known.stride() == x.stride()
        and known.dtype == x.dtype
        and known.device == x.device
    )
