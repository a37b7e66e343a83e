"""Weights of a run over a quantized base, out of its checkpoint and the base's files, layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from losia_dist.checkpoint.quantized import overlay_of
from losia_dist.checkpoint.reader import Reader, layout_of
from losia_dist.errors import CheckpointError
from losia_dist.export.base_codes import BaseCodes
from losia_dist.subnet.differences import Left
from losia_dist.subnet.layout import Layout, Places


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
        self._base: BaseCodes | None = None
        if not self.layers:
            if onto:
                raise CheckpointError(
                    f"{reader.path} has no quantized base, so that there is nothing to add onto: leave onto out."
                )
            return
        self._base = BaseCodes(reader, self.layers, self._weight_of, base_model, onto=onto)

    def read(self, layer: str) -> Tensor:
        """A weight with the present subnets, as a plain one is stored, on the CPU, in the dtype of the run's values."""
        assert self._base is not None
        packed, made = self._base.codes(layer)
        codes = made
        if packed.overlay is None:
            codes = self._moved_codes(layer, made)
        else:
            packed.overlay.write(overlay_of(self.reader, layer))
        trained = packed.dense(codes, packed.dtype)
        for site, places in self._present(layer):
            trained[places] = self.reader.model_copy(f"{site}.subnet").to(trained.dtype)
        if not self.onto:
            return trained
        change = trained.float() - packed.decode(made, packed.dtype).float()
        return (self._base.original(layer).float() + change).to(packed.dtype)

    def blocks(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """Places that subnets were in since the base, as `ExportedWeights.blocks` gives them."""
        assert self._base is not None
        shape, layout = tuple(self.layers[layer]["shape"]), self._base.layout(layer)
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
