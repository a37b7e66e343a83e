"""A linear layer's products with its whole weight in FP8: y = x W^T and dx = dy W (docs/algorithm.md, "FP8 products").

Dimensions in names: t tokens, m output neurons, n input neurons.

Each operand is multiplied by a power of two, so that its largest value comes close to what the format holds, and is rounded
once. The power follows from the operand alone and is worked out on its device: nothing is kept from call to call, and the host
waits for nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from losia_dist.errors import UnsupportedError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # of x and W; of dy
STEP = 16  # sizes of a weight that cuBLASLt takes are multiples of this
CAPABILITY = (8, 9)  # of the first NVIDIA GPUs with FP8 units
_TOP = {E4M3: 8, E5M2: 15}  # the largest value of either format is 1.75 times 2 to this
_BLOCK = 2**24  # values that are scaled at a time: bounds what is held beside the FP8 copy


def float8_linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b: x [..., n], matrix W [m, n] of any floating dtype, bias [m] -> [..., m] in the dtype of x."""
    flat = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype)
    if flat.shape[0] == 0:  # nothing to scale by
        return functional.linear(x, matrix.to(x.dtype), bias)
    fused = bias if x.element_size() == 2 else None  # cuBLASLt adds none to an fp32 result
    y = _product(flat, E4M3, matrix, fused)
    if bias is not None and fused is None:
        y += bias
    return y.view(*x.shape[:-1], matrix.shape[0])


def float8_input_gradient(grad_y: Tensor, matrix: Tensor) -> Tensor:
    """dx = dy W: grad_y [..., m], matrix W [m, n] of any floating dtype -> [..., n] in the dtype of grad_y."""
    flat = grad_y.reshape(-1, grad_y.shape[-1])
    if flat.shape[0] == 0:
        return grad_y @ matrix.to(grad_y.dtype)
    return _product(flat, E5M2, matrix.t()).view(*grad_y.shape[:-1], matrix.shape[1])


def has_float8_sizes(m: int, n: int, dtype: torch.dtype) -> bool:
    """Whether a weight [m, n] of this dtype can take part."""
    return m % STEP == 0 and n % STEP == 0 and dtype in (torch.bfloat16, torch.float32)


def refuse_device(device: torch.device) -> None:
    """Each rank by itself, before training.

    Raises:
        UnsupportedError: the device has no units for FP8, or takes other formats.
    """
    where = None
    if device.type not in ("cpu", "cuda", "meta"):
        where = f"{device.type} devices were not tried"
    elif device.type == "cuda" and torch.version.hip is not None:
        where = "GPUs under ROCm take other FP8 formats (fnuz)"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor} and no units for FP8"
    if where is not None:
        raise UnsupportedError(
            f"weight_products='fp8': {where}. NVIDIA GPUs of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer are "
            "needed (Ada, Hopper, Blackwell): leave weight_products out."
        )


def _product(left: Tensor, form: torch.dtype, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right^T: [t, k] in `form`, and [m, k] in e4m3 -> [t, m] in the dtype of left, summed in fp32."""
    a, a_scale = _rounded(left, form)
    b, b_scale = _rounded(right, E4M3)
    # Row by column, as cuBLASLt wants it: b holds the rows of `right`, whichever way the weight lies.
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=left.dtype)


def _rounded(matrix: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix [a, b] in FP8, contiguous, and what its values are to be multiplied by: fp32 []."""
    scale, back = _scales(torch.linalg.vector_norm(matrix, math.inf), _TOP[form])
    found = torch.empty(matrix.shape, dtype=form, device=matrix.device)
    rows = max(1, _BLOCK // matrix.shape[1])
    for block, target in zip(matrix.split(rows), found.split(rows), strict=True):
        # bf16 and fp32 have the exponents that a scale may need; fp16, which evaluation may compute in, has not.
        target.copy_((block.float() if block.dtype == torch.float16 else block) * scale)
    return found, back


def _scales(largest: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """2^k with k = floor(log2(1.75 * 2^top / largest)) between -126 and 126, and 2^-k: fp32 [] both.

    largest: [], not negative. If it is infinite or NaN the second is NaN: FP8 may round infinity to a number, and what was not
    finite must not become so. Made of an fp32's bits, exact on any device: 127 is the exponent's bias, 23 the mantissa's bits.
    """
    largest = largest.float()
    # The exponent of `largest`, one more where its mantissa is above 1.75: the carry of this sum.
    exponent = (largest.view(torch.int32) + 0x1FFFFF) >> 23
    power = (top + 2 * 127 - exponent).clamp(1, 2 * 127 - 1)
    scale, back = (power << 23).view(torch.float32), ((2 * 127 - power) << 23).view(torch.float32)
    return scale, torch.add(back, largest, alpha=0)  # 0 times what is not finite is NaN
