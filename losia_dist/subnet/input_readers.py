"""Which linear layers read the same input, as the first forward pass shows: those that are located on the same columns.

That a module holds them and that their inputs are of one width is not enough: an attention's output layer often is as wide as
q, k and v, and reads something else. Values are compared, not memory: a compiler gives each layer a copy, and lets another
input follow in the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from losia_dist.subnet.convert import group_names
from losia_dist.subnet.shared_inputs import families
from losia_dist.subnet.site import Site

_COMPARED = 64  # neurons of an input, at least, where it has as many
_UNSEEN, _ALIKE, _UNLIKE = range(3)  # inputs of two layers on a rank; what speaks against sharing is larger


class InputReaders:
    """Compares what each layer is called with first to what the layer of its family got that was called before it.

    Families are those of `shared_inputs.families`. The host does not wait for a comparison before the slot ends.

    sites: of the run. share_columns: of `Located`; if false, no layer shares with another, and none is watched.
    largest: elementwise maximum over all ranks, of a tensor of integers.
    """

    def __init__(self, sites: Sequence[Site], share_columns: bool, largest: Callable[[Tensor], Tensor]) -> None:
        self._share_columns, self._largest = share_columns, largest
        # Layer -> the one of its family that was called before it, and whether with the same (bool []); None: it was the first.
        self._before: dict[Site, tuple[Site, Tensor | bool] | None] = {}
        self._module = ""  # whose layers were called last
        # Of its families (by their first layers): the layer that was called last, and what is kept of its input.
        self._latest: dict[Site, tuple[Site, Tensor]] = {}
        self._watched: list[Site] = []
        for family in self._candidates(sites):
            if family[0].is_tiled:  # an MLP that is watched is not computed in tiles; its first layers read one input
                continue
            self._watched += family
            for site in family:
                site.input_sink = partial(self._see, family, site)
        self.watches = bool(self._watched)

    def families(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Those of one group that share columns together, each other site by itself, as their first ones come.

        Called by all ranks, with equal results: a rank need not have seen every layer called. Layers that any rank has seen
        called with unlike inputs do not share; one that no rank has seen called counts as a reader of the first's input. One
        number is sent for each two layers that may share, and the host waits for it.
        """
        candidates = self._candidates(sites)
        if not candidates:
            return [[site] for site in sites]
        leaders = {site: self._leader(site) for family in candidates for site in family}
        pairs = [pair for family in candidates for pair in combinations(family, 2)]
        mine = [_seen(leaders[one], leaders[other]) for one, other in pairs]
        agreed = self._largest(torch.tensor(mine, device=sites[0].row_index.device)).tolist()
        unlike = {pair for pair, seen in zip(pairs, agreed, strict=True) if seen == _UNLIKE}
        first_of: dict[Site, Site] = {}
        for family in candidates:
            found: list[list[Site]] = []
            for site in family:
                fits = next((one for one in found if not any((other, site) in unlike for other in one)), None)
                if fits is None:
                    found.append(fits := [])
                fits.append(site)
                first_of[site] = fits[0]
        together: dict[Site, list[Site]] = {}
        for site in sites:
            together.setdefault(first_of.get(site, site), []).append(site)
        return list(together.values())

    def forget(self) -> None:
        """Let go of what is kept of inputs."""
        self._latest = {}

    def remove(self) -> None:
        """Take this off the layers."""
        self.forget()
        for site in self._watched:
            site.input_sink = None

    def _candidates(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Layers of one group that may share."""
        groups = [[site for site in sites if site.group_name == name] for name in group_names(sites)]
        return [family for group in groups for family in families(group, self._share_columns) if len(family) > 1]

    def _leader(self, site: Site) -> Site | None:
        """The first layer of its family that was called with the same input; None: this one was not called here."""
        if site not in self._before:
            return None
        before = self._before[site]
        return site if before is None or not bool(before[1]) else self._leader(before[0])

    @torch.no_grad()
    def _see(self, family: list[Site], site: Site, x: Tensor, _: int) -> None:
        """Called in forward, until each of the family was called: a pass that fails between two of them is begun anew."""
        if not x.numel():  # of an expert that got no token
            return
        module = site.name.rpartition(".")[0]
        if module != self._module:
            self._module, self._latest = module, {}
        part = x[..., :: max(1, x.shape[-1] // _COMPARED)].clone()
        if site not in self._before:
            before = self._latest.get(family[0])
            self._before[site] = None if before is None else (before[0], _equal(before[1], part))
        self._latest[family[0]] = (site, part)
        if all(other in self._before for other in family):
            for other in family:
                other.input_sink = None


def _seen(leader: Site | None, other: Site | None) -> int:
    if leader is None or other is None:
        return _UNSEEN
    return _ALIKE if leader is other else _UNLIKE


def _equal(one: Tensor, other: Tensor) -> Tensor | bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    both_nan = (one != one) & (other != other)  # padding may be that, where nothing is learned from it
    return ((one == other) | both_nan).all()
