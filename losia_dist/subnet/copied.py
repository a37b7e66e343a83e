"""Deep copies of a layer: they compute what the layer did then, and are refused once something was averaged into them.

A subnet is a window into its weight. The mean of windows in different places is no window into the mean weight: a running mean
of parameters (AveragedModel, EMA, SWA) is right until the first re-localization, and wrong from then on.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from losia_dist.errors import UnsupportedError
from losia_dist.fingerprint import loading_print
from losia_dist.subnet.layer import SubnetLayer

Layer = TypeVar("Layer", bound=SubnetLayer)

HOW = (
    "Subnets move, so that means of their parameters (AveragedModel, EMA, SWA, means of state dicts) are means of values from "
    "different places of the weight. Average whole weights: after losia.consolidate() or from exported models, as "
    "docs/averaging.md shows."
)
_OF_THE_RUN = ("gradient_sink", "gradient_witness", "kept_inputs")  # what collects for the run that is copied from
_copies: weakref.WeakKeyDictionary[SubnetLayer, weakref.WeakSet[SubnetLayer]] = weakref.WeakKeyDictionary()


def deep_copy(layer: Layer, memo: dict[int, Any]) -> Layer:
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


def note_state(layer: SubnetLayer) -> None:
    """What a copy holds now is of one moment: subnet, place and weight."""
    layer.copied = None if layer.subnet.is_meta else (layer.subnet._version, int(loading_print(_local(layer.subnet))))


def check_copy(layer: SubnetLayer) -> None:
    """A copy's subnet must be what was copied.

    Raises:
        UnsupportedError: something was averaged, or otherwise written, into it.
    """
    if _was_changed(layer, thoroughly=True):
        raise changed_copy(layer.name)


def copies_changed(layers: Iterable[SubnetLayer], thoroughly: bool) -> bool:
    """Whether anything was written into copies that this rank has of a run's layers; costs next to nothing where there is none.

    thoroughly: also what was written past the version counter (`.data`); waits for the device.
    """
    if not _copies:
        return False
    return any(_was_changed(made, thoroughly) for layer in layers for made in list(_copies.get(layer, ())))


def changed_copy(where: str) -> UnsupportedError:
    """The error for a copy that was changed; `where`: its layer, or whose copy it is."""
    return UnsupportedError(
        f"a deep copy of a model with subnets was changed since it was made ({where}), by something that knows of no subnets. "
        f"{HOW}"
    )


def _was_changed(layer: SubnetLayer, thoroughly: bool) -> bool:
    if layer.copied is None:
        return False
    version, known = layer.copied
    if not thoroughly and layer.subnet._version == version:
        return False
    if int(loading_print(_local(layer.subnet))) != known:
        return True
    layer.copied = layer.subnet._version, known
    return False


def check_index(layer: SubnetLayer, name: str, index: Tensor, size: int) -> None:
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
