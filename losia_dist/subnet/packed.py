"""`PackedWeight`: a frozen weight that is stored as codes (4 bits, 8 bits), and what its values are.

A quantized base is never trained and, but for one policy, never written. A subnet's values are written into the dense
temporary that a layer computes with. Where a subnet moves on, what it changed stays beside the codes, as an `Overlay`: an
update is a small part of the distance between two codes, so that rounding it back into them would erase it.

Codes live in the module's `weight`, or the parameter of its experts, an ordinary frozen parameter that any engine replicates
or cuts. Scales are known here, whole on every rank; the overlay is cut where the codes are (`Differences.share`).
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.errors import UnsupportedError
from losia_dist.ranks.fingerprint import fingerprint
from losia_dist.subnet.experts_overlay import ExpertsOverlay
from losia_dist.subnet.layout import ONE_MATRIX, Layout, Places
from losia_dist.subnet.overlay import Overlay

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class PackedWeight(ABC):
    """A weight that a module stores as codes: W [m, n], or the matrices of experts, [E, m, n] or [E, n, m].

    Attributes:
        kind: "nf4", "fp4", "int8" or "fp8".
        shape: of the values, as a plain weight would be stored. layout: how that has the matrices.
        dtype: of its values, which a subnet of it gets too.
        storage: dtype of the tensor that holds the codes. An engine that casts it would destroy them.
        overlay: what subnets left in it; None: it is rounded into the codes.
        retired: how subnets leave it (`LoSiAConfig.retired`). moves: how many have.
        seed: of the rounding: that of the run, and the layer's name.
    """

    kind: str
    codes_per_byte = 1

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, storage: torch.dtype, retired: str, layout: Layout = ONE_MATRIX
    ) -> None:
        self.shape, self.dtype, self.storage, self.layout = shape, dtype, storage, layout
        self.overlay: Overlay | ExpertsOverlay | None = None
        if retired != "stochastic":
            m, n = layout.matrix_shape(shape)
            self.overlay = Overlay((m, n), retired) if layout.experts is None else ExpertsOverlay((shape[0], m, n), retired)
        self.retired, self.moves, self.seed = retired, 0, ""
        # Gives other values of this shape in the codes' place, for a while: those of the original (`export.onto`).
        self.original: Callable[[torch.dtype, torch.device], Tensor] | None = None
        self.print: int | None = None  # `print_of` its codes as they were loaded, once known
        self._figures: list[float] | None = None

    def dense(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values with all that subnets left in them, without the present one: of `shape`, new, in a floating dtype.

        codes: the whole stored tensor.
        """
        values = self.decode(codes, dtype) if self.original is None else self.original(dtype, codes.device)
        if self.overlay is not None:
            self.overlay.add_to(self.layout.matrices(values))
        return values

    @property
    def needs_all_ranks(self) -> bool:
        """Whether `dense` communicates, so that every rank that shares the weight must form it as often as the others."""
        return self.overlay is not None and self.overlay.is_shared

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of the codes alone: of `shape`, new."""
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

    def values_at(self, bits: Tensor, places: Places) -> Tensor:
        """The values in these places with all that subnets left in them, in `dtype`: to the bit what `dense` has there.

        bits: int64 [r, c], or [X, r, c] of experts, the stored elements of `elements_at`. places: `Layout.places`.
        """
        values = self.decoded_at(bits, places)
        return values if self.overlay is None else self.overlay.add_to_block(values, *self._index(places))

    def decoded_at(self, bits: Tensor, places: Places) -> Tensor:
        """The values of the codes alone in these places, as above; without data where the codes are on the meta device."""
        if bits.is_meta:  # which scales are not moved to
            return torch.empty(bits.shape, dtype=self.dtype, device="meta")
        flat = self.flat(places)
        return (self._levels(bits.device)[self._code(bits, flat)] * self._scale_at(flat)).to(self.dtype)

    def flat(self, places: Places) -> Tensor:
        """Where the places lie among the values, counted row by row: int64 [r, c] or [X, r, c]."""
        position = places[0]
        for index, size in zip(places[1:], self.shape[1:], strict=True):
            position = position * size + index
        return position

    def elements_at(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Which elements of the stored tensor hold the codes of these places: an int64 index for each of its dimensions."""
        return flat // self.shape[-1], flat % self.shape[-1]

    def retire(self, bits: Tensor, places: Places, values: Tensor) -> None:
        """Keep the values that a subnet leaves in these places, as closely as the overlay's form holds them. bits: as above."""
        assert self.overlay is not None
        before = self.values_at(bits, places)
        add: Any = self.overlay.add
        add(*self._index(places), values.to(torch.float32) - before.to(torch.float32))
        self.moves += 1

    def _index(self, places: Places) -> tuple[Tensor, ...]:
        """Rows [r] and columns [c]; of experts their numbers [X], rows [X, r] and columns [X, c]."""
        if self.layout.experts is None:
            return tuple(index.flatten() for index in places)
        expert, first, second = places
        row, column = (second, first) if self.layout.transposed else (first, second)
        return expert.flatten(), row.squeeze(-1), column.squeeze(-2)

    def rounded(self, flat: Tensor, values: Tensor) -> Tensor:
        """Codes, int64, of values in these places: of the two nearest, the farther one as seldom as makes the mean right."""
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
        """The codes' values, of `shape`, new, in a floating dtype."""


@dataclass(frozen=True)
class PackedParameter:
    """A parameter that holds codes, in the module that computes with it.

    name: full name of the linear layer, or of the experts' weight.
    """

    name: str
    module: nn.Module
    parameter: str
    packed: PackedWeight

    @property
    def weight(self) -> nn.Parameter:
        """The stored tensor. Another object from time to time: FSDP2 replaces it whenever it gathers or frees it."""
        return getattr(self.module, self.parameter)  # type: ignore[no-any-return]

    @property
    def weight_name(self) -> str:
        """What a plain model calls the weight."""
        return self.name if self.packed.layout.experts is not None else f"{self.name}.{self.parameter}"


def packed_of(module: nn.Module, parameter: str = "weight") -> PackedWeight | None:
    """What a module's parameter stores as codes, or None."""
    found: dict[str, PackedWeight] = module.__dict__.get("packed_weights", {})
    return found.get(parameter)


def packed_weights(model: nn.Module) -> dict[str, PackedParameter]:
    """All that a model stores as codes, by name."""
    found = {}
    for path, module in model.named_modules():
        for parameter, packed in module.__dict__.get("packed_weights", {}).items():
            name = path if packed.layout.experts is None else f"{path}.{parameter}"
            found[name] = PackedParameter(name, module, parameter, packed)
    return found


def same_scales(one: list[float], other: list[float]) -> bool:
    """Whether `PackedWeight.figures` are of the same scales, rounding aside."""
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, other, strict=True))


def as_integers(tensor: Tensor) -> Tensor:
    """A view of a tensor's bits, a whole number an element."""
    return tensor.view(_INTEGERS[tensor.element_size()])
