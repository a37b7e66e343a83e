"""`ParameterAccess` to a model with quantized weights: their values, wherever the engine keeps their codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from losia_dist.sharding.interface import ParameterAccess
from losia_dist.subnet.differences import Shares
from losia_dist.subnet.layout import Places
from losia_dist.subnet.listed_experts import is_listed
from losia_dist.subnet.packed import PackedParameter, PackedWeight, packed_weights


class PackedAccess:
    """Speaks of a quantized weight as of the matrix, or matrices, that its codes stand for; everything else is the engine's own
    access.

    Writing a block into one is what a subnet does that moves on: its `Overlay` keeps it, cut as the codes are. Reading a
    whole one gives what the layer computes with, the present subnet in it: nothing is ever written back for that
    (`LoSiA.consolidate`).

    Args:
        model: after the engine took it.
        engine: access to the parameters as they are stored.

    Raises:
        UnsupportedError: the engine has cast codes.
    """

    def __init__(self, model: nn.Module, engine: ParameterAccess) -> None:
        self.engine = engine
        self.weight_is_resident = engine.weight_is_resident
        self.layers = packed_weights(model)  # by name
        for one in self.layers.values():
            one.packed.check_storage(one.weight)
        self._follow_casts()

    def share_overlays(self) -> None:
        """Let the ranks that share a weight share its overlay too; called by all of them, as the model was prepared."""
        for one in self.layers.values():
            # A rank without a token for an expert that is a module of its own does not compute it: no collectives in there.
            is_alone = one.packed.layout.experts is None and is_listed(one.name)
            if one.packed.overlay is not None and not is_alone:
                one.packed.overlay.share(self.engine.shares(one.weight))

    @contextmanager
    def whole_overlays(self) -> Iterator[None]:
        """Each rank keeps all of every overlay meanwhile, so that a forward pass communicates nothing for one.

        For passes that ranks do not make together, over weights that the engine has gathered (`GatheredParameters`, `unshard`).
        Entered by all ranks, which gather each overlay once; left without communication. No steps are taken inside.
        """
        overlays = [one.packed.overlay for one in self.layers.values() if one.packed.overlay is not None]
        shared = [(overlay, overlay.shares) for overlay in overlays]
        for overlay in overlays:
            overlay.share(None)
        try:
            yield
        finally:
            for overlay, shares in shared:
                overlay.share(shares)

    def _follow_casts(self) -> None:
        """Where `model.to(dtype)` has cast the model since it was converted, its values have that dtype too."""
        cast = {}
        for one in self.layers.values():
            for site in one.module.__dict__.get("sites", ()):
                if site.packed is one.packed and site.asked_dtype is None:
                    cast[one.packed.dtype] = site.subnet.dtype
        for one in self.layers.values():
            one.packed.dtype = cast.get(one.packed.dtype, one.packed.dtype)

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

    def shares(self, parameter: Tensor) -> Shares | None:
        return self.engine.shares(parameter)

    def read_block(self, weight: Tensor, places: Places) -> Tensor:
        packed = self._packed(weight)
        if packed is None:
            return self.engine.read_block(weight, places)
        return packed.values_at(self._bits(weight, packed, packed.flat(places)), places)

    @torch.no_grad()
    def write_block(self, weight: Tensor, places: Places, values: Tensor) -> None:
        one = self._find(weight)
        if one is None:
            self.engine.write_block(weight, places, values)
            return
        packed, flat, values = one.packed, one.packed.flat(places), values.to(places[0].device)
        if packed.overlay is not None:
            packed.retire(self._bits(weight, packed, flat), places, values)
            return
        self.print_of(one)  # of the codes as they were loaded
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
        one = self._find(parameter)
        stored = self.engine.read_whole(parameter)
        return stored if one is None else self._present(one, stored)

    def _present(self, one: PackedParameter, stored: Tensor) -> Tensor:
        """What the module computes with, from the whole stored tensor, as a plain weight would be stored."""
        values = one.packed.dense(stored, one.packed.dtype)
        for site in one.module.__dict__.get("sites", ()):
            if site.names.weight == one.parameter:
                site.write_into(values, self.engine.read_whole(site.subnet))
        return values

    @torch.no_grad()
    def read_change(self, parameter: Tensor) -> Tensor:
        """`read_whole` of a quantized weight less its codes' values: what training changed, fp32, on every rank."""
        one = self.found(parameter)
        stored = self.engine.read_whole(parameter)
        changed = self._present(one, stored).to(torch.float32)
        return changed.sub_(one.packed.decode(stored, one.packed.dtype))

    def decoded_at(self, weight: Tensor, places: Places) -> Tensor:
        """The values of a quantized weight's codes alone in these places (`Layout.places`), on every rank."""
        packed = self.found(weight).packed
        return packed.decoded_at(self._bits(weight, packed, packed.flat(places)), places)

    def read_codes(self, parameter: Tensor) -> Tensor:
        """The whole stored tensor, on every rank."""
        return self.engine.read_whole(parameter)

    def write_codes(self, parameter: Tensor, codes: Tensor) -> None:
        """Replace the whole stored tensor; codes: of its dtype and number of elements, on any device, equal on every rank."""
        self.engine.write_whole(parameter, codes.view(self.engine.shape(parameter)))

    @torch.no_grad()
    def print_of(self, one: PackedParameter) -> int:
        """`PackedWeight.print_of` the codes as they were loaded. Called by all ranks, which gather them the first time."""
        if one.packed.print is None:
            one.packed.print = one.packed.print_of(self.engine.read_whole(one.weight))
        return one.packed.print

    def write_whole(self, parameter: Tensor, values: Tensor) -> None:
        assert self._packed(parameter) is None, "codes are not written"
        self.engine.write_whole(parameter, values)

    def found(self, parameter: Tensor) -> PackedParameter:
        """The quantized weight that this is the stored tensor of."""
        one = self._find(parameter)
        assert one is not None
        return one

    def _find(self, parameter: Tensor) -> PackedParameter | None:
        # Looked up each time: FSDP2 replaces the parameter whenever it gathers or frees it.
        return next((one for one in self.layers.values() if one.weight is parameter), None)

    def _packed(self, parameter: Tensor) -> PackedWeight | None:
        one = self._find(parameter)
        return None if one is None else one.packed
