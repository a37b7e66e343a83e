"""What an optimizer keeps for one tensor: read, put back, and cleared where a subnet moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def keeps_adam_state(optimizer: Optimizer) -> bool:
    """Whether all that the optimizer keeps for a tensor is Adam's: moments of its shape, a step count, a master copy.

    By class, not by names of entries: others keep quantized moments or products under the same names.
    """
    kind = type(optimizer)
    known = kind in (torch.optim.Adam, torch.optim.AdamW) or vars(kind).get("keeps_adam_state", False)
    return known or kind.__module__.startswith("deepspeed.ops.adam")


def clear_state(optimizer: Optimizer, holders: list[Any], restart_bias_correction: bool) -> None:
    """Begin anew for these tensors; Adam's master values stay, and its step counts unless they are to restart."""
    if not keeps_adam_state(optimizer):
        for holder in holders:
            optimizer.state.pop(holder, None)
        return
    for holder in holders:
        state = optimizer.state.get(holder, {})
        for key in _MOMENTS:
            if key in state:
                state[key].zero_()
        if restart_bias_correction and "step" in state:
            state["step"] = state["step"].zero_() if isinstance(state["step"], Tensor) else 0


def as_tensor(value: Any) -> Tensor | None:
    """An entry of optimizer state as a tensor, a number as [] (int64, or torch's default dtype); None for what is neither."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value) if isinstance(value, int | float) else None


def store_state(
    kept: dict[str, Any], state: dict[str, Tensor], like: Tensor, store: Callable[[Tensor, Tensor], None], optimizer: Optimizer
) -> None:
    """Put whole tensors into an optimizer's state for one holder, in place wherever something is there already.

    Args:
        kept: the optimizer's entries for the holder; its "master" is left alone.
        state: as `StateAccess.read_state` gives it, whole tensors and scalars []; "value" is left to the caller.
        like: the holder, in whatever part this rank keeps; entries that the optimizer has not made yet are made in its form.
        store: (entry, whole values): writes the part of the values that the entry, of the holder's shape, stands for.
        optimizer: whose state it is.
    """
    if not keeps_adam_state(optimizer):
        kept.clear()  # what the state does not name is made anew
    # torch's optimizers keep step counts on the host, unless a fused or captured step reads them on the device.
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    scalars = like.device if on_device else torch.device("cpu")
    for key in kept.keys() - state.keys() - {"master"}:
        kept[key] = kept[key].zero_() if isinstance(kept[key], Tensor) else 0
    for key, values in state.items():
        if key == "value":
            continue
        if values.dim() == 0 and not isinstance(kept.get(key), Tensor):
            kept[key] = values.to(scalars, copy=True) if values.is_floating_point() else int(values)
        elif values.dim() == 0:
            kept[key].copy_(values)
        else:
            if key not in kept and values.shape == state["value"].shape:
                kept[key] = torch.zeros_like(like, dtype=values.dtype)
            elif key not in kept:  # an optimizer that keeps less than one number per weight; refused where state is cut
                kept[key] = values.new_zeros(values.shape, device=like.device)
            store(kept[key], values)
