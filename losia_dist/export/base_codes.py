"""The codes of a quantized base, which no checkpoint holds: read from the base's files again, or made again from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint.reader import Reader
from losia_dist.errors import CheckpointError
from losia_dist.export.loaded_form import LoadedWeights
from losia_dist.export.plain_class import model_without_weights
from losia_dist.subnet.four_bits import quantize_4bit
from losia_dist.subnet.layout import ONE_MATRIX, Layout
from losia_dist.subnet.packed import PackedWeight, same_scales
from losia_dist.subnet.packed_kinds import EightBit, FourBit

_FP8 = torch.float8_e4m3fn


class BaseCodes:
    """A base in 4 bits or int8 is made again, layer by layer, as its loading made it; one in FP8 has its codes in its files.

    Args:
        layers: a checkpoint's "quantized". weight_of: a layer's name -> its weight's.
        base_model: directory of the model that was loaded, in safetensors.
        onto: the original's values are asked for too.

    Raises:
        CheckpointError: no directory was given, or a base in FP8, which has no original.
    """

    def __init__(
        self,
        reader: Reader,
        layers: dict[str, dict[str, Any]],
        weight_of: dict[str, str],
        base_model: str | Path | None,
        *,
        onto: bool,
    ) -> None:
        self._layers, self._weight_of = layers, weight_of
        in_fp8 = [weight_of[layer] for layer, entry in layers.items() if entry["kind"] == "fp8"]
        if in_fp8 and onto:
            raise CheckpointError(
                f"{reader.path} was trained over a base in FP8, whose files hold codes and no original to add to: write the "
                "whole model, by losia-dist export without --onto_base and --delta."
            )
        if base_model is None:
            raise CheckpointError(
                f"{reader.path} was trained over a quantized base, of which it holds the print alone: give base_model, the "
                "directory of the model that was quantized."
            )
        self._files = LoadedWeights(base_model, lambda: model_without_weights(reader), list(weight_of.values()))
        self._scales = LoadedWeights(base_model, lambda: model_without_weights(reader), in_fp8, suffix="_scale_inv")

    def original(self, layer: str) -> Tensor:
        """A weight before it was quantized, in the dtype that it was quantized from, on the CPU."""
        tensor, entry = self._read(layer), self._layers[layer]
        self._files.check_original(self._weight_of[layer])
        return tensor.to(getattr(torch, entry.get("made_from", entry["dtype"])))

    def codes(self, layer: str) -> tuple[PackedWeight, Tensor]:
        """What is known of a weight, with nothing that subnets left, and its codes as they were loaded, on the CPU.

        Raises:
            CheckpointError: the files lack it, or lead to other codes than the run had.
        """
        entry = self._layers[layer]
        try:
            packed, codes = self._make(layer, entry)
        except ImportError as error:
            raise CheckpointError(
                f"a base in {entry['kind']} is made again by bitsandbytes: pip install bitsandbytes."
            ) from error
        packed.dtype = getattr(torch, entry["dtype"])
        if packed.print_of(codes) != entry["print"] or not same_scales(packed.figures(), entry["scales"]):
            raise CheckpointError(
                f"the codes of {layer} made from {self._files.path} are not those of the run: another version of the base, or "
                "codes that another device made. Export from the live run, by export_model(losia, directory)."
            )
        return packed, codes

    def layout(self, layer: str) -> Layout:
        entry = self._layers[layer]
        return Layout(entry["transposed"], (0, entry["experts"])) if "experts" in entry else ONE_MATRIX

    def _make(self, layer: str, entry: dict[str, Any]) -> tuple[PackedWeight, Tensor]:
        retired, dtype = entry["retired"], getattr(torch, entry["dtype"])
        if entry["kind"] == "fp8":
            return self._fp8(layer, entry, dtype)
        original = self.original(layer)
        if entry["kind"] == "int8":
            from bitsandbytes.functional import int8_vectorwise_quant

            codes, scale, _ = int8_vectorwise_quant(original.to(torch.float16))  # as bitsandbytes does it, whatever comes
            scale = scale.to(torch.float32).unsqueeze(1) / 127
            return EightBit("int8", codes, scale, (1, codes.shape[1]), dtype, retired), codes.view(torch.uint8)
        codes, state = quantize_4bit(original, entry["kind"], double=entry["double"], block=entry["blocksize"])
        return FourBit(state, torch.uint8, retired, self.layout(layer)), codes

    def _fp8(self, layer: str, entry: dict[str, Any], dtype: torch.dtype) -> tuple[PackedWeight, Tensor]:
        codes, name = self._read(layer), self._weight_of[layer]
        if codes.dtype != _FP8 or self._scales.shape(name) is None:
            lacks = f"has {name} in {codes.dtype}" if codes.dtype != _FP8 else f"lacks the scales of {name} (weight_scale_inv)"
            raise CheckpointError(
                f"{self._files.path} {lacks}: give the directory of the FP8 model that was loaded. A base that was quantized "
                "to FP8 as it was loaded is exported from the live run, by export_model(losia, directory)."
            )
        rows = -(-codes.shape[-2] // entry["block"][0])  # of blocks
        scale = self._scales.tensor(name).to(torch.float32).reshape(*codes.shape[:-2], rows, -1)
        packed = EightBit("fp8", codes, scale, tuple(entry["block"]), dtype, entry["retired"], self.layout(layer))
        return packed, codes.view(torch.uint8).flatten(0, -2)

    def _read(self, layer: str) -> Tensor:
        name = self._weight_of[layer]
        shape = self._files.shape(name)
        if shape is None:
            raise CheckpointError(
                f"{self._files.path} has no weight {name!r}: give the directory of the model that was quantized."
            )
        if list(shape) != self._layers[layer]["shape"]:
            raise CheckpointError(
                f"{name} in {self._files.path} is {list(shape)}, and {self._layers[layer]['shape']} in the run: give the "
                "directory of the model that was quantized."
            )
        return self._files.tensor(name)
