"""Weights of a run over a quantized base, out of its checkpoint: the base is quantized again, layer by layer, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint.quantized import overlay_of
from losia_dist.checkpoint.reader import Reader
from losia_dist.errors import CheckpointError
from losia_dist.export.model_directory import ModelDirectory
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
        self._sites = {entry["weight"]: site for site, entry in reader.manifest["subnets"].items()}
        self._base: ModelDirectory | None = None
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
        self._base = ModelDirectory(base_model)

    def read(self, layer: str) -> Tensor:
        """W [m, n] with the present subnet, on the CPU, in the dtype of the run's values."""
        entry, original = self.layers[layer], self._original(layer)
        packed, codes = self._packed(layer, original)
        if packed.overlay is None:
            codes = self._moved_codes(layer, codes)
        else:
            packed.overlay.left = overlay_of(self.reader, layer)
        trained = packed.dense(codes, packed.dtype)
        site = self._sites.get(f"{layer}.weight")
        if site is not None:
            rows, columns = (self.reader.tensor(f"{part}/{site}") for part in ("rows", "columns"))
            trained[rows[:, None], columns] = self.reader.model_copy(f"{site}.subnet").to(trained.dtype)
        if not self.onto:
            return trained
        plain, plain_codes = self._packed(layer, original)
        change = trained.float() - plain.dense(plain_codes, packed.dtype).float()
        return (original.float() + change).to(getattr(torch, entry["dtype"]))

    def blocks(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """Places that subnets were in since the base, rows and columns, int64 on the CPU."""
        m, n = self.layers[layer]["shape"]
        found = []
        for left in overlay_of(self.reader, layer):
            rows = torch.arange(m) if left.rows is None else left.rows
            found.append((rows, torch.arange(n) if left.columns is None else left.columns))
        site = self._sites.get(f"{layer}.weight")
        return found if site is None else [*found, (self.reader.tensor(f"rows/{site}"), self.reader.tensor(f"columns/{site}"))]

    def _original(self, layer: str) -> Tensor:
        name = f"{layer}.weight"
        assert self._base is not None
        if name not in self._base:
            raise CheckpointError(
                f"{self._base.path} has no weight {name!r}: give the directory of the model that was quantized."
            )
        tensor = self._base.tensor(name)
        if not tensor.is_floating_point() or list(tensor.shape) != self.layers[layer]["shape"]:
            raise CheckpointError(
                f"{name} in {self._base.path} is {list(tensor.shape)}, {tensor.dtype}: the original's weights are needed, "
                "as they were before quantization."
            )
        return tensor.to(getattr(torch, self.layers[layer]["dtype"]))

    def _packed(self, layer: str, original: Tensor) -> tuple[FourBit, Tensor]:
        try:
            from bitsandbytes.functional import quantize_4bit
        except ImportError as error:
            raise CheckpointError("a base in 4 bits is made again by bitsandbytes: pip install bitsandbytes.") from error
        entry: dict[str, Any] = self.layers[layer]
        codes, state = quantize_4bit(
            original.contiguous(),
            blocksize=entry["blocksize"],
            quant_type=entry["kind"],
            compress_statistics=entry["double"],
        )
        packed = FourBit(state, torch.uint8, entry["retired"])
        if packed.print_of(codes) != entry["print"] or not same_scales(packed.figures(), entry["scales"]):
            raise CheckpointError(
                f"the codes of {layer} made from {self._base.path if self._base else ''} are not those of the run: "
                "another version of the base, or codes that another device made. Export from the live run, by "
                "export_model(losia, directory)."
            )
        return packed, codes

    def _moved_codes(self, layer: str, codes: Tensor) -> Tensor:
        return self.reader.tensor(f"codes/{layer}").view(codes.shape) if self.layers[layer]["moves"] else codes
