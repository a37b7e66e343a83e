"""What training changed in a quantized base, on top of the original weights: to export it from a live run, and to try it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint.session import session_of
from losia_dist.checkpoint.tensor_names import plain_name, unwrap
from losia_dist.errors import CheckpointError, ConfigError
from losia_dist.export.loaded_form import LoadedWeights
from losia_dist.run.conductor import LoSiA
from losia_dist.sharding.packed_access import PackedAccess
from losia_dist.subnet.packed import PackedParameter


class OntoOriginal(PackedAccess):
    """`read_whole` of a quantized weight gives the original's with the change; everything else is as in the run.

    Args:
        model: the run's. access: to its parameters. original: directory of the model that was quantized.

    Raises:
        ConfigError: the base is not quantized, what it was is lost, or no directory was given.
        CheckpointError: the directory lacks a weight, or has one of another shape.
    """

    def __init__(self, model: Any, access: Any, original: str | Path | None) -> None:
        if not isinstance(access, PackedAccess):
            raise ConfigError("onto=True, but the base of this run is not quantized: leave it out.")
        if original is None:
            raise ConfigError("onto=True needs base_model, the directory of the model that was quantized.")
        super().__init__(unwrap(model), access.engine)
        if any(one.packed.overlay is None and one.packed.moves for one in self.layers.values()):
            raise ConfigError(
                "onto=True with retired='stochastic': what subnets left was rounded into the codes, whose first values this "
                "run no longer has. Save a checkpoint, and export that."
            )
        names = [plain_name(one.weight_name) for one in self.layers.values()]
        self._access, self._original = access, LoadedWeights(original, lambda: unwrap(model), names)
        for name, one in zip(names, self.layers.values(), strict=True):
            self._check(name, one)

    def original(self, one: PackedParameter) -> Tensor:
        """The original of a quantized weight, as a plain one would be stored, on the CPU, read from its file."""
        return self._original.tensor(plain_name(one.weight_name))

    def _check(self, name: str, one: PackedParameter) -> None:
        if self._original.shape(name) != one.packed.shape:
            raise CheckpointError(
                f"{self._original.path} has no weight {name!r} of {list(one.packed.shape)}: give the directory of the original."
            )
        self._original.check_original(name)

    def read_whole(self, parameter: Tensor) -> Tensor:
        one = self._find(parameter)
        if one is None:
            return super().read_whole(parameter)
        change = self._access.read_change(parameter)
        return (self.original(one).to(change.device, change.dtype) + change).to(self.dtype(parameter))


@contextmanager
def computing_onto(losia: LoSiA, original: str | Path | None) -> Iterator[None]:
    """While it is open the model computes with the original's weights and what training changed, as `onto=True` exports it.

    Called by all ranks, between steps, to evaluate; nothing may train. Each forward pass reads the original's weights from
    their files. Raises: as `OntoOriginal`.
    """
    losia.parameters.reshard()
    agreement = session_of(losia).agreement
    access = agreement.attempt(None, lambda: OntoOriginal(losia.model, losia.parameters, original))
    sites = [site for site in losia.sites if site.packed is not None]
    trained = {site: losia.parameters.read_whole(site.subnet) for site in sites}
    layers = list(access.layers.values())
    try:
        for site in sites:
            one = access.found(site.weight)
            places = site.layout.places(one.packed.shape, site.row_index, site.col_index)
            there = tuple(index.cpu() for index in places)
            whole = access.original(one)[there].to(site.row_index.device, torch.float32)
            decoded = access.decoded_at(site.weight, places).to(torch.float32)
            losia.parameters.write_whole(site.subnet, trained[site].to(torch.float32) + whole - decoded)
        for layer in layers:
            layer.packed.original = partial(_original, access, layer)
        yield
    finally:
        for layer in layers:
            layer.packed.original = None
        for site in sites:
            losia.parameters.write_whole(site.subnet, trained[site])


def _original(access: OntoOriginal, one: PackedParameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    return access.original(one).to(device, dtype, copy=True)
