"""The forms of quantized weights that can hold subnets: bitsandbytes' NF4, FP4 and LLM.int8, Transformers' block FP8."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.errors import UnsupportedError
from losia_dist.subnet.four_bits import dequantize_4bit
from losia_dist.subnet.layout import ONE_MATRIX, Layout
from losia_dist.subnet.packed import PackedWeight

_FP8 = torch.float8_e4m3fn


class FourBit(PackedWeight):
    """NF4 or FP4 of bitsandbytes: two codes a byte, the first in the high half, a scale for each block of values.

    The bytes may be stored as a wider dtype (`bnb_4bit_quant_storage`), and the scales may be quantized themselves.
    """

    codes_per_byte = 2

    def __init__(self, state: Any, storage: torch.dtype, retired: str, layout: Layout = ONE_MATRIX) -> None:
        super().__init__(tuple(state.shape), state.dtype, storage, retired, layout)
        self.kind, self._state = state.quant_type, state

    def describe(self) -> dict[str, Any]:
        made_from = str(self._state.dtype).removeprefix("torch.")
        return {
            "kind": self.kind,
            "blocksize": self._state.blocksize,
            "double": bool(self._state.nested),
            "made_from": made_from,
        }

    def scales(self) -> list[Tensor]:
        state = self._state
        return [state.absmax] if not state.nested else [state.absmax, state.state2.absmax, state.offset.reshape(1)]

    def block_scales(self) -> Tensor:
        return self._absmax(self._state.absmax.device)

    def _absmax(self, device: torch.device) -> Tensor:
        """fp32, one scale for each block."""
        state = self._state
        if state.absmax.device != device:
            state.to(device)
        if not state.nested:
            return state.absmax.to(torch.float32)
        from bitsandbytes.functional import dequantize_blockwise

        return (dequantize_blockwise(state.absmax, state.state2) + state.offset).to(torch.float32)

    def _decode_all(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        packed = codes.reshape(-1).view(torch.uint8).unsqueeze(1)
        return dequantize_4bit(packed, self._absmax(codes.device), self._state.blocksize, self.kind, self.shape, dtype)

    def elements_at(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat // self.per_element, torch.zeros_like(flat)

    def with_code(self, bits: Tensor, flat: Tensor, code: Tensor) -> Tensor:
        shift = self._shift(flat)
        return (bits & ~(15 << shift)) | (code << shift)

    def _code(self, bits: Tensor, flat: Tensor) -> Tensor:
        return (bits >> self._shift(flat)) & 15

    def _shift(self, flat: Tensor) -> Tensor:
        """By how many bits the code of a place lies above the lowest bit of its element."""
        return (flat // 2) % self.storage.itemsize * 8 + 4 * (1 - flat % 2)

    def _levels(self, device: torch.device) -> Tensor:
        return self._state.code.to(device, torch.float32)  # type: ignore[no-any-return]

    def _scale_at(self, flat: Tensor) -> Tensor:
        return self._absmax(flat.device)[flat // self._state.blocksize]


class EightBit(PackedWeight):
    """Codes of a byte, one a value, and scales for rows (LLM.int8) or for blocks (FP8).

    They are stored as uint8, whatever they are: engines and collectives know of that. Those of experts [E, m, n] are stored as
    one matrix [E m, n], which engines cut more evenly than by experts.

    Args:
        kind: "int8" or "fp8".
        codes: [m, n], int8 or float8; of experts [E, m, n], where the rows of a block divide m.
        scale: fp32 [m / block rows, n / block columns], rounded up; a value is its code times its block's scale. Of experts
            [E, m / block rows, n / block columns].
        block: rows and columns of one.
        dtype, retired, layout: as for `PackedWeight`.
    """

    def __init__(
        self,
        kind: str,
        codes: Tensor,
        scale: Tensor,
        block: tuple[int, int],
        dtype: torch.dtype,
        retired: str,
        layout: Layout = ONE_MATRIX,
    ) -> None:
        super().__init__(tuple(codes.shape), dtype, torch.uint8, retired, layout)
        self.kind, self._of, self._scale, self._block = kind, codes.dtype, scale.reshape(-1, scale.shape[-1]), block

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "block": list(self._block)}

    def scales(self) -> list[Tensor]:
        return [self._scale]

    def block_scales(self) -> Tensor:
        return self._scale

    def _on(self, device: torch.device) -> Tensor:
        self._scale = self._scale.to(device)
        return self._scale

    def _decode_all(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        (rows, columns), scale, codes = self._block, self._on(codes.device), codes.view(self._of)
        m, n = codes.shape
        if rows == 1 and columns == n:
            return torch.mul(codes, scale, out=torch.empty(m, n, dtype=dtype, device=codes.device)).view(self.shape)
        values = codes.to(dtype)  # exact: FP8 has fewer digits than any
        if m % rows == 0 and n % columns == 0:
            values.view(m // rows, rows, n // columns, columns).mul_(scale[:, None, :, None])
        else:
            values.mul_(scale.repeat_interleave(rows, 0)[:m].repeat_interleave(columns, 1)[:, :n])
        return values.view(self.shape)

    def with_code(self, bits: Tensor, flat: Tensor, code: Tensor) -> Tensor:
        return code

    def _code(self, bits: Tensor, flat: Tensor) -> Tensor:
        return bits & 255

    def _levels(self, device: torch.device) -> Tensor:
        return torch.arange(256, dtype=torch.uint8, device=device).view(self._of).to(torch.float32)

    def _scale_at(self, flat: Tensor) -> Tensor:
        n, (rows, columns) = self.shape[-1], self._block
        return self._on(flat.device)[flat // n // rows, flat % n // columns]


def pack(module: nn.Module, retired: str | None, dtype: torch.dtype) -> tuple[PackedWeight, Tensor] | None:
    """What a quantized linear layer stores, and the tensor that holds its codes; None if it is none of a known kind.

    The module stays as it is.

    Args:
        retired: form of what subnets leave (`LoSiAConfig.retired`); None: "nf4" over bitsandbytes, "int8" over FP8.
        dtype: of the model's other weights; values have it where the codes do not tell.

    Raises:
        UnsupportedError: a known kind in a state that cannot be read.
    """
    kind = type(module).__name__
    if _is(module, "bitsandbytes.nn.modules", "Linear4bit"):
        return _four_bit(module, retired or "nf4")
    if _is(module, "bitsandbytes.nn.modules", "Linear8bitLt"):
        return _int8(module, retired or "nf4", dtype)
    if kind == "FP8Linear" and _is(module, "transformers.integrations.finegrained_fp8", "FP8Linear"):
        return _fp8(module, retired or "int8", dtype)
    return None


def is_known(module: nn.Module) -> bool:
    """Whether `pack` reads this kind of quantized linear layer."""
    return type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt", "FP8Linear")


def _is(module: nn.Module, where: str, name: str) -> bool:
    kind = getattr(sys.modules.get(where), name, None)
    return kind is not None and isinstance(module, kind)


def _four_bit(module: Any, retired: str) -> tuple[PackedWeight, Tensor]:
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise UnsupportedError(
            "a bitsandbytes layer in 4 bits has no codes yet: bitsandbytes makes them when the model is moved to its device. "
            "Load it with from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True)), or move it first."
        )
    refuse_state(state, weight.dtype)
    return FourBit(state, weight.dtype, retired), weight.detach()


def refuse_state(state: Any, storage: torch.dtype) -> None:
    """Look at bitsandbytes' codes, and at the dtype that they are stored as.

    Raises:
        UnsupportedError: they are not as its quantization makes them, or engines would cast them.
    """
    if storage == torch.float16:
        raise UnsupportedError(
            "its codes are stored as torch.float16 (bnb_4bit_quant_storage in BitsAndBytesConfig), which engines that train in "
            "bf16 or fp32 would cast: set torch.uint8, the default, or torch.bfloat16 for FSDP2 with a param_dtype."
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedError(
            "an evaluation has laid the codes of a bitsandbytes layer out anew for this processor, and rounded its scales: "
            "load the model again, and call get_losia_model before the first forward pass."
        )


def _int8(module: Any, retired: str, dtype: torch.dtype) -> tuple[PackedWeight, Tensor]:
    if module.state.has_fp16_weights:
        raise UnsupportedError("Linear8bitLt with has_fp16_weights=True keeps no codes: load the model with load_in_8bit=True.")
    codes = module.weight.CB if module.weight.CB is not None else module.state.CB
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if codes is None or scale is None:
        raise UnsupportedError("a Linear8bitLt has no codes yet: move the model to its device before get_losia_model.")
    scale = scale.detach().to(torch.float32).unsqueeze(1) / 127
    return EightBit("int8", codes, scale, (1, codes.shape[1]), dtype, retired), codes.detach().view(torch.uint8)


def _fp8(module: Any, retired: str, dtype: torch.dtype) -> tuple[PackedWeight, Tensor]:
    codes, scale = module.weight.detach(), module.weight_scale_inv.detach()
    if codes.dtype != _FP8:
        raise UnsupportedError(f"an FP8Linear holds {codes.dtype}: only float8_e4m3fn can hold subnets. Load it dequantized.")
    block = tuple(module.block_size or codes.shape)
    scale = scale.to(torch.float32).reshape(-(-codes.shape[0] // block[0]), -1)
    return EightBit("fp8", codes, scale, block, dtype, retired), codes.view(torch.uint8)
