"""The loss by Liger's fused linear cross-entropy kernel. Not timed until a GPU has run it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.loss.logits import LogitsRule
from losia_dist.subnet.linear import SubnetLinear

_FIX = "Use the chunked loss instead: --loss chunked, or use_chunked_loss(model)."


def refuse_unless_liger_runs(head: Any, rule: LogitsRule) -> None:
    """Raises: ConfigError or UnsupportedError where Liger's kernel cannot compute this output layer's loss."""
    if not torch.cuda.is_available():
        raise ConfigError(f"the Liger loss needs a GPU, and this machine shows none. {_FIX}")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(f"the Liger loss needs the package liger-kernel (pip install liger-kernel). {_FIX}")
    if isinstance(head, SubnetLinear):
        raise UnsupportedError(
            "the Liger loss does not work with an output layer that trains a subnet (output_rank_factor): the kernel would "
            f"form the gradient of the whole weight. {_FIX}"
        )
    if not isinstance(head, torch.nn.Linear):
        raise UnsupportedError(f"the Liger loss needs an nn.Linear as output layer, not {type(head).__name__}. {_FIX}")
    if rule.divisor != 1.0:
        raise UnsupportedError(f"the Liger loss cannot scale logits, and this model divides them by {rule.divisor}. {_FIX}")


def liger_cross_entropy(head: Any, hidden: Tensor, targets: Tensor, rule: LogitsRule, ignore_index: int) -> Tensor:
    """Sum of the losses, an fp32 scalar; shapes as in `chunked_cross_entropy`. CUDA tensors only."""
    if not hidden.is_cuda:
        raise ConfigError(f"the Liger loss needs the model on a GPU; it is on {hidden.device}. {_FIX}")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=ignore_index, reduction="sum", softcap=rule.cap, accum_dtype=torch.float32
    )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    return loss(head.weight.to(dtype), flat, targets.reshape(-1), bias).float()
