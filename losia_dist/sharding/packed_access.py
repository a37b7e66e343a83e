"""`ParameterAccess` to a model with quantized weights: their values, wherever the engine keeps their codes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.sharding.interface import ParameterAccess
from losia_dist.subnet.layout import Places
from losia_dist.subnet.packed import PackedWeight, packed_modules, packed_of


class PackedAccess:
    """Speaks of a quantized weight as of the matrix that its codes stand for; everything else is the engine's own access.

    Writing a block into one is what a subnet does that moves on: its `Overlay` keeps it, on every rank. Reading a whole one
    gives what the layer computes with, the present subnet in it: nothing is ever written back for that (`LoSiA.consolidate`).

    Args:
        model: after the engine took it.
        engine: access to the parameters as they are stored.

    Raises:
        UnsupportedError: the engine has cast codes.
    """

    def __init__(self, model: nn.Module, engine: ParameterAccess) -> None:
        self.engine = engine
        self.weight_is_resident = engine.weight_is_resident
        self.layers = packed_modules(model)  # by full name
        self._modules = list(self.layers.values())
        for module in self._modules:
            module.packed.check_storage(module.weight)

    def reshard(self) -> None:
        self.engine.reshard()

    def without_reduction(self) -> AbstractContextManager[None]:
        return self.engine.without_reduction()

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        packed = self._packed(parameter)
        return self.engine.shape(parameter) if packed is None else packed.shape

    def dtype(self, parameter: Tensor) -> torch.dtype:
        packed = self._packed(parameter)
        return self.engine.dtype(parameter) if packed is None else packed.dtype

    def read_block(self, weight: Tensor, places: Places) -> Tensor:
        packed = self._packed(weight)
        if packed is None:
            return self.engine.read_block(weight, places)
        rows, columns = (index.flatten() for index in places)
        return packed.values_at(self._bits(weight, packed, packed.flat(rows, columns)), rows, columns)

    @torch.no_grad()
    def write_block(self, weight: Tensor, places: Places, values: Tensor) -> None:
        packed = self._packed(weight)
        if packed is None:
            self.engine.write_block(weight, places, values)
            return
        rows, columns = (index.flatten() for index in places)
        flat, values = packed.flat(rows, columns), values.to(rows.device)
        if packed.overlay is not None:
            packed.retire(self._bits(weight, packed, flat), rows, columns, values)
            return
        self.print_of(self._module(weight))  # of the codes as they were loaded
        codes = packed.rounded(flat, values)
        for place in range(packed.per_element):  # codes that share an element, one after the other
            chosen = flat % packed.per_element == place
            where, code = flat[chosen], codes[chosen]
            bits = packed.with_code(self._bits(weight, packed, where), where, code)
            self.engine.write_bits(weight, packed.elements_at(where), bits)

    def _bits(self, weight: Tensor, packed: PackedWeight, flat: Tensor) -> Tensor:
        return self.engine.read_bits(weight, packed.elements_at(flat))

    def read_bits(self, weight: Tensor, places: Places) -> Tensor:
        return self.engine.read_bits(weight, places)

    def write_bits(self, weight: Tensor, places: Places, bits: Tensor) -> None:
        self.engine.write_bits(weight, places, bits)

    @torch.no_grad()
    def read_whole(self, parameter: Tensor) -> Tensor:
        module = self._module(parameter)
        stored = self.engine.read_whole(parameter)
        return stored if module is None else self._present(module, stored)

    def _present(self, module: Any, stored: Tensor) -> Tensor:
        """What a layer computes with, from its whole stored tensor: [m, n]."""
        packed: PackedWeight = module.packed
        sites = module.__dict__.get("sites", ())
        if not sites:
            return packed.dense(stored, packed.dtype)
        subnet = self.engine.read_whole(sites[0].subnet)
        return sites[0].present(stored, subnet, packed.dtype, again=True)  # type: ignore[no-any-return]

    @torch.no_grad()
    def read_change(self, parameter: Tensor) -> Tensor:
        """`read_whole` of a quantized weight less its codes' values: what training changed, [m, n] fp32, on every rank."""
        module: Any = self._module(parameter)
        stored = self.engine.read_whole(parameter)
        base = module.packed.decode(stored, module.packed.dtype)
        return self._present(module, stored).to(torch.float32) - base.to(torch.float32)

    def decoded_at(self, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The values of a quantized weight's codes alone, in these places: [r, c], on every rank."""
        packed = self._packed(weight)
        assert packed is not None
        return packed.decoded_at(self._bits(weight, packed, packed.flat(rows, columns)), rows, columns)

    def read_codes(self, parameter: Tensor) -> Tensor:
        """The whole stored tensor, on every rank."""
        return self.engine.read_whole(parameter)

    def write_codes(self, parameter: Tensor, codes: Tensor) -> None:
        """Replace the whole stored tensor; codes: of its dtype and number of elements, on any device, equal on every rank."""
        self.engine.write_whole(parameter, codes.view(self.engine.shape(parameter)))

    @torch.no_grad()
    def print_of(self, module: Any) -> int:
        """`PackedWeight.print_of` the codes as they were loaded. Called by all ranks, which gather them the first time."""
        packed = packed_of(module)
        assert packed is not None
        if packed.print is None:
            packed.print = packed.print_of(self.engine.read_whole(module.weight))
        return packed.print

    def write_whole(self, parameter: Tensor, values: Tensor) -> None:
        assert self._packed(parameter) is None, "codes are not written"
        self.engine.write_whole(parameter, values)

    def _module(self, parameter: Tensor) -> nn.Module | None:
        # Looked up each time: FSDP2 replaces the parameter whenever it gathers or frees it.
        return next((module for module in self._modules if module.weight is parameter), None)

    def _packed(self, parameter: Tensor) -> PackedWeight | None:
        module = self._module(parameter)
        return None if module is None else packed_of(module)
