"""What is written must be what the engine steps: tried on every subnet at the start, and looked at once after the first move.

An engine keeps its own masters, in an order of its own, and an optimizer may keep further ones. Where the access objects of
`sharding` and the engine's step part ways, training goes on with other weights' values and nothing else shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losia_dist.errors import UnsupportedError, some
from losia_dist.run.parts import RunParts
from losia_dist.sharding.interface import ParameterAccess, StateAccess
from losia_dist.subnet.site import Site

_CODES = 127  # whole numbers up to here are exact in bf16 and fp16


@torch.no_grad()
def check_masters(parts: RunParts) -> None:
    """Compare every subnet's master with the model, write other values through the access objects, find them again by the road
    of the engine's step (`StateAccess.stepped`), and put everything back. Called by all ranks, before the first step.

    One subnet at a time; two reads of it where it is sharded, one collective of three numbers a layer and one host
    synchronisation in all.

    Raises:
        UnsupportedError: on every rank, with the layers: no optimizer steps them, what was written did not get where
            the step takes its values from, or the masters are not the model's values.
    """
    sites, collectives = parts.sites, parts.collectives
    found = torch.stack([_try(site, place, parts.parameters, parts.state) for place, site in enumerate(sites)])
    everyone = collectives.stack(found.reshape(-1)).view(collectives.world_size, len(sites), 3).sum(0).tolist()
    sizes = [site.subnet_size for site in sites]
    kept, stale, missed = zip(*everyone, strict=True)
    unstepped = [site.name for site, count, size in zip(sites, kept, sizes, strict=True) if count < size]
    if unstepped:
        raise UnsupportedError(
            f"no optimizer steps {some(unstepped)}, or not all of it: its values lie in none of the vectors that the engine's "
            "step changes. Build the optimizer and the engine from the model that is trained, after get_losia_model."
        )
    # First: a value that got lost has made other masters stale.
    lost = [site.name for site, count in zip(sites, missed, strict=True) if count]
    if lost:
        raise UnsupportedError(
            f"values written for {some(lost)} do not reach the masters that the engine steps (in {sum(missed)} places): it "
            "keeps them in another order, or a second time. Leave out settings of the engine or the optimizer that change "
            "where master weights are kept (docs/support-matrix.md lists those that work)."
        )
    old = [site.name for site, count in zip(sites, stale, strict=True) if count]
    if old:
        raise UnsupportedError(
            f"the master values of {some(old)} are not the model's (in {sum(stale)} places): the first step would write "
            "them over the weights. Load weights before the engine and the optimizer are made, or resume with load_checkpoint."
        )


def _try(site: Site, place: int, parameters: ParameterAccess, state: StateAccess) -> Tensor:
    """int64 [3] on the layer's device: elements this rank keeps, masters that differ from the model, values that got lost."""
    subnet = site.subnet
    before = parameters.read_whole(subnet)
    stepped = state.stepped(subnet)
    kept = None if stepped is None else stepped[0].clone()
    device = site.row_index.device
    stale = torch.zeros((), dtype=torch.int64, device=device) if stepped is None else _differing(*stepped)
    codes = torch.arange(before.numel(), device=before.device).mul_(31).add_(17 * place).remainder_(_CODES).add_(1)
    written = codes.view(before.shape).to(before.dtype)
    state.write_master(subnet, written.to(torch.float32))
    parameters.write_whole(subnet, written)
    missed = _differing(written, parameters.read_whole(subnet))
    if stepped is not None and kept is not None:
        missed = missed + _differing(*stepped)
        fragment = state.master_fragment(subnet)
        if fragment is not None:
            master = stepped[0].reshape(-1)
            missed = missed + _differing(fragment.reshape(-1)[: master.numel()], master)
        stepped[0].copy_(kept)
    parameters.write_whole(subnet, before)
    count = torch.full((), 0 if stepped is None else stepped[0].numel(), dtype=torch.int64, device=device)
    return torch.stack([count, stale.to(device), missed.to(device)])


def _differing(master: Tensor, model: Tensor) -> Tensor:
    """Number of places where the model does not hold the rounded master; two kinds of "not a number" are the same."""
    rounded = master.to(model.device, model.dtype)
    return ((rounded != model) & ~(rounded.isnan() & model.isnan())).sum()


class FirstMove:
    """After the first step that follows a re-localization: each moved subnet holds its rounded master, and went on from the
    values of its new place. An optimizer that keeps masters of its own, out of reach, would have gone on from the old ones.

    Holds this rank's part of the moved subnets, old and new, for one step; `done` from then on.
    """

    def __init__(self, parts: RunParts) -> None:
        self.done = False
        self._state, self._collectives = parts.state, parts.collectives
        self._old: dict[Site, Tensor | None] = {}
        self._moved: dict[Site, Tensor | None] = {}

    def before(self, sites: list[Site]) -> None:
        """These layers are about to be given other subnets."""
        if not self.done:
            self._old |= {site: self._held(site) for site in sites}

    def after(self, sites: list[Site]) -> None:
        """They have been."""
        if not self.done:
            self._moved |= {site: self._held(site) for site in sites}

    @torch.no_grad()
    def verify(self) -> None:
        """Call on every rank after each step, before the next re-localization. Waits for the device once.

        Raises:
            UnsupportedError: on every rank, with the layers.
        """
        if self.done or not self._moved:
            return
        sites = list(self._moved)
        found = torch.stack([self._look(site) for site in sites])
        everyone = self._collectives.stack(found.reshape(-1)).view(-1, len(sites), 3).sum(0).tolist()
        self.done, self._old, self._moved = True, {}, {}
        apart = [site.name for site, (differing, _, _) in zip(sites, everyone, strict=True) if differing]
        if apart:
            raise UnsupportedError(
                f"after the first step in its new place {some(apart)} does not hold its rounded master values: the engine or "
                "the optimizer steps another copy of them. Leave out settings that keep master weights a second time."
            )
        # Far nearer to what was there before than to where it was moved: no step does that.
        back = [site.name for site, (_, new, old) in zip(sites, everyone, strict=True) if new > 16 * old]
        if back:
            raise UnsupportedError(
                f"the first step after {some(back)} got another subnet put the old subnet's values in the new place: the "
                "optimizer keeps master values of its own that cannot be reached. Use LoSiAAdamW, or an optimizer without them."
            )

    def _held(self, site: Site) -> Tensor | None:
        stepped = self._state.stepped(site.subnet)
        return None if stepped is None else stepped[1].clone()

    def _look(self, site: Site) -> Tensor:
        """float64 [3]: places without the rounded master, and the squared distances from the new and from the old values."""
        stepped, old, new = self._state.stepped(site.subnet), self._old[site], self._moved[site]
        device = site.row_index.device
        if stepped is None or old is None or new is None:
            return torch.zeros(3, dtype=torch.float64, device=device)
        values = stepped[1]
        distances = [torch.dist(values.float(), other.float()).square() for other in (new, old)]
        return torch.stack([n.to(device, torch.float64) for n in (_differing(*stepped), *distances)])
