"""`PackedWeight`: a frozen weight that is stored as codes (4 bits, 8 bits), and what its values are.

A quantized base is never trained and, but for one policy, never written. A subnet's values are written into the dense
temporary that a layer computes with. Where a subnet moves on, what it changed stays beside the codes, as an `Overlay`: an
update is a small part of the distance between two codes, so that rounding it back into them would erase it.

Codes live in the module's `weight`, an ordinary frozen parameter that any engine replicates or cuts. Scales are known here,
whole on every rank.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.errors import UnsupportedError
from losia_dist.ranks.fingerprint import fingerprint
from losia_dist.subnet.overlay import Overlay

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class PackedWeight(ABC):
    """A weight W [m, n] that a module stores as codes.

    Attributes:
        kind: "nf4", "fp4", "int8" or "fp8".
        shape: (m, n).
        dtype: of its values, which a subnet of it gets too.
        storage: dtype of the tensor that holds the codes. An engine that casts it would destroy them.
        overlay: what subnets left in it; None: it is rounded into the codes.
        retired: how subnets leave it (`LoSiAConfig.retired`). moves: how many have.
        seed: of the rounding: that of the run, and the layer's name.
    """

    kind: str
    codes_per_byte = 1

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, storage: torch.dtype, retired: str) -> None:
        self.shape, self.dtype, self.storage = shape, dtype, storage
        self.overlay = None if retired == "stochastic" else Overlay(shape, retired)
        self.retired, self.moves, self.seed = retired, 0, ""
        # Gives other values [m, n] in the codes' place, for a while: those of the original (`export.onto`).
        self.original: Callable[[torch.dtype, torch.device], Tensor] | None = None
        self.print: int | None = None  # `print_of` its codes as they were loaded, once known
        self._figures: list[float] | None = None

    def dense(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """W with all that subnets left in it, without the present one: [m, n], new, in a floating dtype.

        codes: the whole stored tensor.
        """
        values = self.decode(codes, dtype) if self.original is None else self.original(dtype, codes.device)
        return values if self.overlay is None else self.overlay.add_to(values)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of the codes alone: [m, n], new."""
        self.check_storage(codes)
        return self._decode_all(codes, dtype)

    def check_storage(self, codes: Tensor) -> None:
        """Raises: UnsupportedError: something cast the tensor that holds the codes."""
        if codes.dtype != self.storage:
            raise UnsupportedError(
                f"a {self.kind} weight stored as {self.storage} was cast to {codes.dtype}, which destroys its codes. Load it "
                f"with a storage that the engine does not cast: bnb_4bit_quant_storage={codes.dtype} in BitsAndBytesConfig, "
                "and call neither model.to(dtype) nor model.half() on a quantized model."
            )

    def values_at(self, bits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """W[R][:, C] with all that subnets left in it: [r, c] in `dtype`, to the bit what `dense` has there.

        bits: int64 [r, c], the stored elements of `elements_at`. rows int64 [r], columns int64 [c].
        """
        values = self.decoded_at(bits, rows, columns)
        return values if self.overlay is None else self.overlay.add_to_block(values, rows, columns)

    def decoded_at(self, bits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The values of the codes alone in these places, as above."""
        flat = self.flat(rows, columns)
        return (self._levels(bits.device)[self._code(bits, flat)] * self._scale_at(flat)).to(self.dtype)

    def flat(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Places in W, counted row by row: int64 [r, c]."""
        return rows.unsqueeze(-1) * self.shape[1] + columns.unsqueeze(-2)

    def elements_at(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Which elements of the stored tensor hold the codes of these places: an int64 index for each of its dimensions."""
        return flat // self.shape[1], flat % self.shape[1]

    def retire(self, bits: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """Keep what a subnet leaves, W[R][:, C] = values [r, c], as closely as the overlay's form holds it. bits: as above."""
        assert self.overlay is not None
        before = self.values_at(bits, rows, columns)
        self.overlay.add(rows, columns, values.to(torch.float32) - before.to(torch.float32))
        self.moves += 1

    def rounded(self, flat: Tensor, values: Tensor) -> Tensor:
        """Codes int64 [r, c] of values [r, c]: of the two nearest, the farther one as seldom as makes the mean right."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{self.moves}".encode()))
        chance = torch.rand(flat.shape, generator=generator).to(flat.device)
        self.moves += 1
        levels, codes = self._levels(flat.device).sort()
        levels = levels[~levels.isnan()]
        scaled = values.to(torch.float32) / self._scale_at(flat).clamp(min=torch.finfo(torch.float32).tiny)
        above = torch.searchsorted(levels, scaled.contiguous()).clamp_(1, levels.numel() - 1)
        low, high = levels[above - 1], levels[above]
        return codes[above - (chance >= (scaled - low) / (high - low)).long()]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What must be equal for codes to mean the same, as JSON."""

    @abstractmethod
    def scales(self) -> list[Tensor]:
        """Tensors that the codes' meaning depends on."""

    @abstractmethod
    def block_scales(self) -> Tensor:
        """fp32: what the codes are multiplied by, block by block."""

    def print_of(self, codes: Tensor) -> int:
        """A number of the exact codes, however they are stored. Waits for the device."""
        return int(fingerprint(codes.detach().contiguous().reshape(-1).view(torch.uint8)))

    def figures(self) -> list[float]:
        """Sums of the scales, of their squares and by place: to compare by `same_scales`. Waits for the device, once.

        Not a print: bitsandbytes quantizes scales less their mean, whose last digit is another one on another device, or with
        another number of threads. The same base has to load there.
        """
        if self._figures is None:
            scales = self.block_scales().detach().reshape(-1).to(torch.float64)
            places = torch.linspace(0, 1, scales.numel(), dtype=torch.float64, device=scales.device)
            self._figures = torch.stack([scales.sum(), (scales * scales).sum(), (scales * places).sum()]).tolist()
        return self._figures

    @property
    def per_element(self) -> int:
        """Codes that an element of the stored tensor holds."""
        return self.storage.itemsize * self.codes_per_byte

    @abstractmethod
    def with_code(self, bits: Tensor, flat: Tensor, code: Tensor) -> Tensor:
        """bits, with the codes of these places set to others; int64 all, of one shape."""

    @abstractmethod
    def _code(self, bits: Tensor, flat: Tensor) -> Tensor:
        """int64 codes of these places, out of the elements that hold them."""

    @abstractmethod
    def _levels(self, device: torch.device) -> Tensor:
        """fp32: the value of each code, before scaling; NaN where a code is none."""

    @abstractmethod
    def _scale_at(self, flat: Tensor) -> Tensor:
        """fp32 scales of these places."""

    @abstractmethod
    def _decode_all(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes' values [m, n], new, in a floating dtype."""


def packed_of(module: nn.Module) -> PackedWeight | None:
    """The weight that a module stores as codes, or None."""
    return module.__dict__.get("packed")


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Full name -> module, of all that store their weight as codes."""
    return {name: module for name, module in model.named_modules() if packed_of(module) is not None}


def same_scales(one: list[float], other: list[float]) -> bool:
    """Whether `PackedWeight.figures` are of the same scales, rounding aside."""
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, other, strict=True))


def as_integers(tensor: Tensor) -> Tensor:
    """A view of a tensor's bits, a whole number an element."""
    return tensor.view(_INTEGERS[tensor.element_size()])
