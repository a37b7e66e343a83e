"""Deep copies of a layer: they compute what the layer did then, and are refused once something was averaged into them.

A subnet is a window into its weight. The mean of windows in different places is no window into the mean weight: a running mean
of parameters (AveragedModel, EMA, SWA) is right until the first re-localization, and wrong from then on.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losia_dist.errors import UnsupportedError
from losia_dist.fingerprint import loading_print

if TYPE_CHECKING:
    from losia_dist.subnet.linear import SubnetLinear

HOW = (
    "Subnets move, so that means of their parameters (AveragedModel, EMA, SWA, means of state dicts) are means of values from "
    "different places of the weight. Average whole weights: after losia.consolidate() or from exported models, as "
    "docs/averaging.md shows."
)
_OF_THE_RUN = ("gradient_sink", "gradient_witness", "kept_inputs")  # what collects for the run that is copied from
_copies: weakref.WeakKeyDictionary[SubnetLinear, weakref.WeakSet[SubnetLinear]] = weakref.WeakKeyDictionary()


def deep_copy(layer: SubnetLinear, memo: dict[int, Any]) -> SubnetLinear:
    """A copy that no conductor drives, and that collects nothing."""
    made = layer.__class__.__new__(layer.__class__)
    memo[id(layer)] = made
    kept = {name: value for name, value in layer.__dict__.items() if name not in _OF_THE_RUN}
    made.__dict__.update(copy.deepcopy(kept, memo))
    made.gradient_sink, made.gradient_witness, made.kept_inputs, made.written = None, None, {}, None
    made.in_mid_step = False
    if layer.copied is None:
        note_state(made)
    _copies.setdefault(layer, weakref.WeakSet()).add(made)
    return made


def note_state(layer: SubnetLinear) -> None:
    """What a copy holds now is of one moment: subnet, place and weight."""
    layer.copied = None if layer.subnet.is_meta else (layer.subnet._version, int(loading_print(_local(layer.subnet))))


def check_copy(layer: SubnetLinear, thoroughly: bool = True) -> None:
    """A copy's subnet must be what was copied. thoroughly: also what was written past the version counter (`.data`).

    Raises:
        UnsupportedError: something was averaged, or otherwise written, into it.
    """
    if layer.copied is None:
        return
    version, known = layer.copied
    if not thoroughly and layer.subnet._version == version:
        return
    if int(loading_print(_local(layer.subnet))) != known:
        raise UnsupportedError(
            f"a deep copy of a model with subnets was changed since it was made ({layer.name}), by something that knows of no "
            f"subnets. {HOW}"
        )
    layer.copied = layer.subnet._version, known


def check_copies(layers: Iterable[SubnetLinear], thoroughly: bool) -> None:
    """`check_copy` of every copy that there is of a run's layers; costs next to nothing where there is none.

    Raises:
        UnsupportedError: as `check_copy`.
    """
    if not _copies:
        return
    for layer in layers:
        for made in list(_copies.get(layer, ())):
            check_copy(made, thoroughly)


def check_index(layer: SubnetLinear, name: str, index: Tensor, size: int) -> None:
    """A place that a state dict brings: whole numbers, ascending, inside the weight.

    Raises:
        UnsupportedError: a mean of several, or no place at all.
    """
    if index.is_meta or layer.awaits_weights:  # the place is drawn anew once the weights are there
        return
    if not index.is_floating_point() and bool((index[1:] > index[:-1]).all()) and 0 <= int(index[0]) <= int(index[-1]) < size:
        return
    raise UnsupportedError(f"{name} of {layer.name} in this state dict is no place that a subnet could be in. {HOW}")


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of it."""
    to_local: Any = getattr(parameter, "to_local", None)
    with torch.no_grad():
        return parameter.detach() if to_local is None else to_local().detach()
