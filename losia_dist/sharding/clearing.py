"""A subnet that moves begins without moments: whether that is known to work with an optimizer.

Adam's moments are zeroed in place (`entries.clear_state`). What any other optimizer keeps is taken away, so that it begins
anew as with a new parameter; that this is so is tried here at the start, on tensors of no consequence.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import UnsupportedError
from losia_dist.sharding.entries import clear_state, keeps_adam_state
from losia_dist.sharding.interface import StateAccess
from losia_dist.subnet.site import Site

_FIX = "Use LoSiAAdamW: a subnet's state is 1/64 of full fine-tuning's as it is."
_RATE = 1e-3  # of the trial: schedules may begin at 0
_MOST = 1 << 24  # elements in the trial


def check_clearing(state: StateAccess, sites: list[Site], config: LoSiAConfig, *, is_cut: bool) -> None:
    """Refuse an optimizer whose state cannot be cleared, saved and put back; before the first step, by each rank alone.

    Args:
        is_cut: each rank keeps a part of a tensor's state (ZeRO, FSDP2).

    Raises:
        UnsupportedError: state that is quantized or no tensor, or not one number per weight where it is cut; state that the
            optimizer does not make anew; a configuration that needs to know Adam's entries. The message names what was seen.
    """
    optimizer = state.optimizer
    if keeps_adam_state(optimizer):
        return
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    # As large as the largest tensor that is cleared: some optimizers treat large ones in another way.
    sizes = Counter[str]()
    for site in sites:
        sizes[site.group_name] += site.subnet_size
    shape = (-(-min(max(sizes.values()), _MOST) // 256) * 8, 32)
    held = [p for group in optimizer.param_groups for p in group["params"]] + state.state_tensors()
    device = held[0].device
    try:
        fresh, entries = _trial(optimizer, shape, device)
        _check_entries(name, entries, shape, keeps_steps=not config.reset_bias_correction, is_cut=is_cut)
        cleared, _ = _trial(optimizer, shape, device, steps_before=3)
        slower, _ = _trial(optimizer, shape, device, rate=_RATE / 8)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever a foreign optimizer makes of it
        raise UnsupportedError(
            f"{name} was tried on a tensor of no consequence, and did not begin anew once its state was taken away: "
            f"{type(error).__name__}: {error}. A subnet that moves needs that. {_FIX}"
        ) from error
    if torch.equal(slower, fresh):
        raise UnsupportedError(
            f"{name} makes the same step whatever its groups' learning rate is (or none at all), so that rewarming would do "
            f"nothing. Turn its own schedule off (Adafactor: relative_step=False). {_FIX}"
        )
    if not torch.equal(cleared, fresh):
        raise UnsupportedError(
            f"{name} keeps something of a tensor outside its state: with that taken away, its next step is not a first step "
            f"(it is off by {(cleared - fresh).abs().max().item():.2g}). A subnet that moves needs one. {_FIX}"
        )


def _check_entries(name: str, state: dict[str, Any], shape: tuple[int, int], *, keeps_steps: bool, is_cut: bool) -> None:
    for key, entry in state.items():
        if entry is None:
            continue
        if isinstance(entry, Tensor) and entry.dim():
            if type(entry) is not Tensor or not entry.dtype.is_floating_point:
                raise UnsupportedError(
                    f"{name} keeps quantized state ({key!r} is a {type(entry).__name__} of {entry.dtype}), which can "
                    f"neither be cleared for one subnet nor saved. {_FIX}"
                )
            if is_cut and entry.shape != shape:
                raise UnsupportedError(
                    f"{name} keeps {key!r} of shape {list(entry.shape)} for a tensor of {list(shape)}; where each rank keeps a "
                    f"part of it (ZeRO, FSDP2), an optimizer must keep one number per weight. {_FIX}"
                )
        elif not isinstance(entry, Tensor | int | float):
            raise UnsupportedError(f"{name} keeps {key!r}, a {type(entry).__name__}, which a checkpoint does not hold. {_FIX}")
        elif keeps_steps:
            raise UnsupportedError(
                f"reset_bias_correction=False keeps Adam's step count, and {name} has {key!r} among state of its own: leave "
                f"reset_bias_correction out. {_FIX}"
            )


def _trial(
    optimizer: Optimizer, shape: tuple[int, int], device: torch.device, *, steps_before: int = 0, rate: float = _RATE
) -> tuple[Tensor, dict[str, Any]]:
    """Values and state of a tensor after one step of a copy of the optimizer; before it other steps, and a clearing."""
    trial: Any = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.__dict__.pop("step", None)  # a scheduler's wrapper, which steps the optimizer itself
    trial._optimizer_step_pre_hooks, trial._optimizer_step_post_hooks = {}, {}
    start = torch.linspace(-1, 1, shape[0] * shape[1], device=device).view(shape)
    tensor = torch.nn.Parameter(start.clone())
    group = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "param_names")}
    group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
    trial.state, trial.param_groups = defaultdict(dict), [{**copy.deepcopy(group), "params": [tensor]}]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
            for step in range(steps_before):
                tensor.grad = start.flip(0).mul(step + 1).cos()
                trial.step()
            clear_state(trial, [tensor], restart_bias_correction=True)
            with torch.no_grad():
                tensor.copy_(start)
            torch.manual_seed(0)
            tensor.grad = start.sin()
            trial.step()
        return tensor.detach(), dict(trial.state[tensor])
    finally:
        trial.__class__ = Optimizer  # what the class lets go of with an instance (DeepSpeed's CPU optimizers) is the original's
