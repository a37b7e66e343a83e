"""Weights of a run over a quantized base, out of its checkpoint: the base is quantized again, layer by layer, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint.quantized import overlay_of
from losia_dist.checkpoint.reader import Reader, layout_of
from losia_dist.errors import CheckpointError
from losia_dist.export.loaded_form import LoadedWeights
from losia_dist.export.plain_class import model_without_weights
from losia_dist.subnet.differences import Left
from losia_dist.subnet.four_bits import quantize_4bit
from losia_dist.subnet.layout import ONE_MATRIX, Layout, Places
from losia_dist.subnet.packed import same_scales
from losia_dist.subnet.packed_kinds import FourBit


class Requantized:
    """The quantized layers of a checkpoint, as they trained, or what changed in them on top of the original weights.

    Args:
        base_model: directory of the model that was quantized as it was loaded, in safetensors.
        onto: give the original weights with the changes, instead of the values of their codes with them.

    Raises:
        CheckpointError: no such directory was given, or a form that cannot be made again.
    """

    def __init__(self, reader: Reader, base_model: str | Path | None, *, onto: bool) -> None:
        self.reader, self.layers, self.onto = reader, reader.manifest.get("quantized", {}), onto
        # A weight's name -> the layer's, which is the same for experts.
        self.layer_of = {name if "experts" in entry else f"{name}.weight": name for name, entry in self.layers.items()}
        self._weight_of = {layer: name for name, layer in self.layer_of.items()}
        self._base: LoadedWeights | None = None
        if not self.layers:
            if onto:
                raise CheckpointError(
                    f"{reader.path} has no quantized base, so that there is nothing to add onto: leave onto out."
                )
            return
        kinds = {entry["kind"] for entry in self.layers.values()} - {"nf4", "fp4"}
        if kinds:
            raise CheckpointError(
                f"{reader.path} was trained over a base in {', '.join(sorted(kinds))}, which is not made again from files: "
                "export from the live run, by export_model(losia, directory)."
            )
        if base_model is None:
            raise CheckpointError(
                f"{reader.path} was trained over a quantized base, of which it holds the print alone: give base_model, the "
                "directory of the model that was quantized."
            )
        self._base = LoadedWeights(base_model, lambda: model_without_weights(reader), list(self.layer_of))

    def read(self, layer: str) -> Tensor:
        """A weight with the present subnets, as a plain one is stored, on the CPU, in the dtype of the run's values."""
        entry, original = self.layers[layer], self._original(layer)
        packed, codes = self._packed(layer, original)
        if packed.overlay is None:
            codes = self._moved_codes(layer, codes)
        else:
            packed.overlay.write(overlay_of(self.reader, layer))
        trained = packed.dense(codes, packed.dtype)
        for site, places in self._present(layer):
            trained[places] = self.reader.model_copy(f"{site}.subnet").to(trained.dtype)
        if not self.onto:
            return trained
        plain, plain_codes = self._packed(layer, original)
        change = trained.float() - plain.dense(plain_codes, packed.dtype).float()
        return (original.float() + change).to(getattr(torch, entry["dtype"]))

    def blocks(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """Places that subnets were in since the base, as `ExportedWeights.blocks` gives them."""
        shape, layout = tuple(self.layers[layer]["shape"]), self._layout(layer)
        m, n = layout.matrix_shape(shape)
        found = [places for _, places in self._present(layer)]
        for left in overlay_of(self.reader, layer):
            count = layout.count if left.experts is None else left.experts.numel()
            rows = torch.arange(m).expand(count, -1) if left.rows is None else left.rows
            columns = torch.arange(n).expand(count, -1) if left.columns is None else left.columns
            if layout.experts is None:
                rows, columns = rows.view(-1), columns.view(-1)
            places = layout.places(shape, rows, columns) if left.experts is None else _of_some(layout, left, rows, columns)
            found.append(places)
        return [block for places in found for block in flat_blocks(shape, places)]

    def _present(self, layer: str) -> list[tuple[str, Places]]:
        """Each subnet in a layer, and its places in the weight."""
        found, shape = [], tuple(self.layers[layer]["shape"])
        for site, entry in self.reader.manifest["subnets"].items():
            if entry["weight"] == self._weight_of[layer]:
                rows, columns = (self.reader.tensor(f"{part}/{site}") for part in ("rows", "columns"))
                found.append((site, layout_of(entry).places(shape, rows, columns)))
        return found

    def _layout(self, layer: str) -> Layout:
        entry = self.layers[layer]
        return Layout(entry["transposed"], (0, entry["experts"])) if "experts" in entry else ONE_MATRIX

    def _original(self, layer: str) -> Tensor:
        name = self._weight_of[layer]
        assert self._base is not None
        shape = self._base.shape(name)
        if shape is None:
            raise CheckpointError(
                f"{self._base.path} has no weight {name!r}: give the directory of the model that was quantized."
            )
        tensor = self._base.tensor(name)
        if not tensor.is_floating_point() or list(shape) != self.layers[layer]["shape"]:
            raise CheckpointError(
                f"{name} in {self._base.path} is {list(tensor.shape)}, {tensor.dtype}: the original's weights are needed, "
                "as they were before quantization."
            )
        entry = self.layers[layer]
        return tensor.to(getattr(torch, entry.get("made_from", entry["dtype"])))

    def _packed(self, layer: str, original: Tensor) -> tuple[FourBit, Tensor]:
        entry: dict[str, Any] = self.layers[layer]
        try:
            codes, state = quantize_4bit(original, entry["kind"], double=entry["double"], block=entry["blocksize"])
        except ImportError as error:
            raise CheckpointError("a base in 4 bits is made again by bitsandbytes: pip install bitsandbytes.") from error
        packed = FourBit(state, torch.uint8, entry["retired"], self._layout(layer))
        packed.dtype = getattr(torch, entry["dtype"])
        if packed.print_of(codes) != entry["print"] or not same_scales(packed.figures(), entry["scales"]):
            raise CheckpointError(
                f"the codes of {layer} made from {self._base.path if self._base else ''} are not those of the run: "
                "another version of the base, or codes that another device made. Export from the live run, by "
                "export_model(losia, directory)."
            )
        return packed, codes

    def _moved_codes(self, layer: str, codes: Tensor) -> Tensor:
        return self.reader.tensor(f"codes/{layer}").view(codes.shape) if self.layers[layer]["moves"] else codes


def _of_some(layout: Layout, left: Left, rows: Tensor, columns: Tensor) -> Places:
    """Places of some experts, which need not follow each other."""
    assert left.experts is not None
    row, column = rows.unsqueeze(-1), columns.unsqueeze(-2)
    first, second = (column, row) if layout.transposed else (row, column)
    return left.experts.view(-1, 1, 1), first, second


def flat_blocks(stored: tuple[int, ...], places: Places) -> list[tuple[Tensor, Tensor]]:
    """(first index, second index) of each matrix's places, in a weight as two dimensions, matrices under each other."""
    *expert, first, second = places
    first = first + expert[0] * stored[-2] if expert else first
    return list(zip(*(torch.atleast_2d(index.flatten(-2)) for index in (first, second)), strict=True))
