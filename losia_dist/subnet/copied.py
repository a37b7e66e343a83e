"""Deep copies of a module with subnets: they compute what the layer did then, and are refused once something was averaged into
them.

A subnet is a window into its weight. The mean of windows in different places is no window into the mean weight: a running mean
of parameters (AveragedModel, EMA, SWA) is right until the first re-localization, and wrong from then on.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.errors import UnsupportedError
from losia_dist.ranks.fingerprint import loading_print
from losia_dist.subnet.site import Site

HOW = (
    "Subnets move, so that means of their parameters (AveragedModel, EMA, SWA, means of state dicts) are means of values from "
    "different places of the weight. Average whole weights: after losia.consolidate() or from exported models, as "
    "docs/averaging.md shows."
)
_copies: weakref.WeakKeyDictionary[Site, weakref.WeakSet[Site]] = weakref.WeakKeyDictionary()


class HoldsSites(nn.Module):
    """A module whose tensors are those of sites. A deep copy of it is driven by no conductor, and collects nothing."""

    sites: list[Site]

    def __deepcopy__(self, memo: dict[int, Any]) -> HoldsSites:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        kept = {name: value for name, value in self.__dict__.items() if name != "sites"}
        made.__dict__.update(copy.deepcopy(kept, memo))
        made.sites = [site.copy_for(made, memo) for site in self.sites]
        for site, copied in zip(self.sites, made.sites, strict=True):
            if site.copied is None:
                note_state(copied)
            _copies.setdefault(site, weakref.WeakSet()).add(copied)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HoldsSites:
        """A copy that is moved or cast is the same copy, whatever the new dtype rounds to."""
        copied = [site for site in self.sites if site.copied is not None]
        for site in copied:
            check_copy(site)
        super()._apply(fn, recurse)
        for site in copied:
            note_state(site)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for site in self.sites:
            _check_loaded(site, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for site in self.sites:
            if site.copied is not None and f"{prefix}{site.names.subnet}" in state_dict:
                note_state(site)


def _check_loaded(site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    """What a state dict brings for a site, before it is loaded.

    Raises:
        UnsupportedError: places that are none (`check_index`); a whole weight without the subnet, whose old values would be
            written over it; of a quantized weight, another state of the run, of which it lacks what subnets left.
    """
    brings = [f"{prefix}{name}" in state_dict for name in (site.names.weight, site.names.subnet)]
    if brings == [True, False] and not (site.awaits_weights or site.subnet.is_meta):
        raise UnsupportedError(
            f"this state dict has the weight of {site.name} and no subnet of it: what the model's subnet holds would be "
            "written over what is loaded. Load weights before get_losia_model; a run goes on by load_checkpoint (under the "
            "Trainer: LoSiATrainer)."
        )
    indices = (site.names.row_index, site.names.col_index)
    for name, size in zip(indices, site.shape, strict=True):
        if f"{prefix}{name}" in state_dict:
            check_index(site, name, state_dict[f"{prefix}{name}"], size)
    if any(brings) and _lacks_overlay(site, [state_dict.get(f"{prefix}{name}") for name in indices]):
        raise UnsupportedError(
            f"{site.name} is quantized, and what subnets left beside its codes is in no state dict: with this one the model "
            "would be neither what was saved nor what it is. A run is saved by save_checkpoint and goes on by "
            "load_checkpoint (under the Trainer: LoSiATrainer)."
        )


def _lacks_overlay(site: Site, places: list[Tensor | None]) -> bool:
    """Whether a state dict with a subnet in these places, rows and columns, may be of a run whose subnets have moved."""
    if site.packed is None or site.packed.overlay is None or site.row_index.is_meta:
        return False
    own = (site.row_index, site.col_index)
    return len(site.packed.overlay) > 0 or not all(
        place is not None and torch.equal(place.to(index.device), index) for place, index in zip(places, own, strict=True)
    )


def note_state(site: Site) -> None:
    """What a copy holds now is of one moment: subnet, place and weight."""
    site.copied = None if site.subnet.is_meta else (site.subnet._version, int(loading_print(_local(site.subnet))))


def check_copy(site: Site) -> None:
    """A copy's subnet must be what was copied.

    Raises:
        UnsupportedError: something was averaged, or otherwise written, into it.
    """
    if _was_changed(site, thoroughly=True):
        raise changed_copy(site.name)


def copies_changed(sites: Iterable[Site], thoroughly: bool) -> bool:
    """Whether anything was written into copies that this rank has of a run's layers; costs next to nothing where there is none.

    thoroughly: also what was written past the version counter (`.data`); waits for the device.
    """
    if not _copies:
        return False
    return any(_was_changed(made, thoroughly) for site in sites for made in list(_copies.get(site, ())))


def changed_copy(where: str) -> UnsupportedError:
    """The error for a copy that was changed; `where`: its layer, or whose copy it is."""
    return UnsupportedError(
        f"a deep copy of a model with subnets was changed since it was made ({where}), by something that knows of no subnets. "
        f"{HOW}"
    )


def _was_changed(site: Site, thoroughly: bool) -> bool:
    if site.copied is None:
        return False
    version, known = site.copied
    if not thoroughly and site.subnet._version == version:
        return False
    if int(loading_print(_local(site.subnet))) != known:
        return True
    site.copied = site.subnet._version, known
    return False


def check_index(site: Site, name: str, index: Tensor, size: int) -> None:
    """A place that a state dict brings: whole numbers, ascending, inside the weight. Waits for the device.

    Args:
        name: of the index in its module. index: [r] or [c], or those of X experts. size: m or n.

    Raises:
        UnsupportedError: a mean of several, or no place at all.
    """
    if index.is_meta or site.awaits_weights:  # the place is drawn anew once the weights are there
        return
    ascending = not index.is_floating_point() and bool((index[..., 1:] > index[..., :-1]).all())
    if ascending and int(index.min()) >= 0 and int(index.max()) < size:
        return
    raise UnsupportedError(f"{name} of {site.name} in this state dict is no place that a subnet could be in. {HOW}")


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of it."""
    to_local: Any = getattr(parameter, "to_local", None)
    with torch.no_grad():
        return parameter.detach() if to_local is None else to_local().detach()
