"""What a layer with subnets computes in under autocast: the same as a dense layer would."""

from __future__ import annotations

import torch

from losia_dist.errors import UnsupportedError


def autocast_dtype(device: str, trains: bool) -> torch.dtype | None:
    """The dtype of autocast on a kind of device; None where there is none.

    Raises:
        UnsupportedError: it is fp16, and a subnet trains.
    """
    if not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16 and torch.is_grad_enabled() and trains:
        raise UnsupportedError(
            "the model trains under autocast in fp16, whose gradient scale would enter the importance: use bf16 "
            "(torch.autocast(..., dtype=torch.bfloat16), mixed_precision: bf16), without a GradScaler."
        )
    return dtype
