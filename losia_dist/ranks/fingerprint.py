"""A 64-bit number of a tensor's exact bits, for comparing what ranks hold without sending it."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 22  # elements turned to int64 at a time: 32 MiB a temporary, whatever the tensor's size
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(values: Tensor) -> Tensor:
    """Sum over the elements of (bits + 1) times place, modulo 2^64; int64 [] on the tensor's device.

    values: any shape, dtypes of 1, 2, 4 or 8 bytes. A change of one element, or an exchange of two, always changes the sum;
    -0.0 and 0.0 and two kinds of NaN differ. Integer arithmetic: the same on every device, in whatever order it is summed. No
    host synchronisation.
    """
    flat = values.detach().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64)
        total += (piece + 1).mul_(torch.arange(start + 1, start + 1 + piece.numel(), device=flat.device)).sum()
    return total


def loading_print(values: Tensor) -> Tensor:
    """`fingerprint` of values rounded to bf16, int64 []: the same before and after an engine has cast a model up or down.

    values: any shape and floating dtype.
    """
    return fingerprint(values.detach().to(torch.bfloat16))
