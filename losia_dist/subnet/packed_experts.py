"""Experts whose fused weights are quantized: by bitsandbytes in 4 bits, or by Transformers in FP8 with scales for blocks."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from losia_dist.errors import UnsupportedError
from losia_dist.subnet.expert_weights import weights_of, why_unfollowed
from losia_dist.subnet.layout import Layout
from losia_dist.subnet.packed import PackedWeight
from losia_dist.subnet.packed_kinds import EightBit, FourBit, refuse_state

Stored = dict[str, tuple[PackedWeight, Tensor]]
_BNB_HOOKS = "bitsandbytes.nn.parametrize"
_FP8 = torch.float8_e4m3fn


def pack_experts(module: Any, retired: str | None, dtype: torch.dtype) -> Stored:
    """What a module of experts stores of its weights, by parameter, and the tensors that hold the codes; nothing for others.

    The module stays as it is. retired, dtype: as for `packed_kinds.pack`.

    Raises:
        UnsupportedError: codes that cannot be read, or experts that compute in another way than subnets would follow.
    """
    found: Stored = {}
    for holder, parameter, layout in weights_of(module):
        known = _four_bits(holder, parameter, layout, retired) or _fp8(holder, parameter, layout, retired, dtype)
        if known is None:
            continue
        if layout.stacked:
            raise UnsupportedError(
                f"{parameter} holds experts under each other in two dimensions, quantized, which was not tried: leave them as "
                "they are (llm_int8_skip_modules)."
            )
        found[parameter] = known
    why = why_unfollowed(module) if found else None
    if why is not None:
        raise UnsupportedError(f"experts with quantized weights: {type(module).__name__} {why}.")
    return found


def strip_quantizer(module: Any, parameters: list[str]) -> None:
    """Take from a module of experts what its quantizer put there: scales, parametrizations and their hooks. In place."""
    if parametrize.is_parametrized(module):
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_hooks):
        for key in [key for key, hook in hooks.items() if _source(hook) == _BNB_HOOKS]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    for parameter in parameters:
        for suffix in ("scale_inv", "activation_scale"):
            module._parameters.pop(f"{parameter}_{suffix}", None)


def _four_bits(holder: Any, parameter: str, layout: Layout, retired: str | None) -> tuple[PackedWeight, Tensor] | None:
    if parametrize.is_parametrized(holder, parameter):
        steps = list(holder.parametrizations[parameter])
        if len(steps) != 1 or type(steps[0]).__module__ != _BNB_HOOKS:
            raise UnsupportedError(
                f"{parameter} is computed from other tensors ({type(steps[0]).__name__}): remove the parametrization first."
            )
        codes, state = holder.parametrizations[parameter].original, steps[0].quant_state
    else:
        codes = holder._parameters.get(parameter)
        state = getattr(codes, "quant_state", None)
        if state is None:
            return None
    refuse_state(state, codes.dtype)
    if len(state.shape) != 3 and not layout.stacked:
        raise UnsupportedError(f"{parameter} holds codes of a tensor of {list(state.shape)}, and not of experts' matrices.")
    return FourBit(state, codes.dtype, retired or "nf4", layout), codes.detach()


def _fp8(
    holder: Any, parameter: str, layout: Layout, retired: str | None, dtype: torch.dtype
) -> tuple[PackedWeight, Tensor] | None:
    kind = getattr(sys.modules.get("transformers.integrations.finegrained_fp8"), "FP8Experts", None)
    if kind is None or not isinstance(holder, kind):
        return None
    codes, scale = holder._parameters[parameter].detach(), holder._parameters[f"{parameter}_scale_inv"].detach()
    if codes.dtype != _FP8:
        raise UnsupportedError(f"{parameter} holds {codes.dtype}: only float8_e4m3fn can hold subnets. Load it dequantized.")
    scale = scale.to(torch.float32).reshape(codes.shape[0], -1, scale.shape[-1])
    E, m, n = codes.shape
    block = (-(-m // scale.shape[1]), -(-n // scale.shape[2]) if holder.block_size is None else holder.block_size[1])
    if block[0] * scale.shape[1] != m:
        raise UnsupportedError(f"{parameter}: {m} rows in {scale.shape[1]} blocks of FP8, which do not divide them.")
    packed = EightBit("fp8", codes, scale, block, dtype, retired or "int8", layout)
    return packed, codes.view(torch.uint8).view(E * m, n)


def _source(hook: Any) -> str:
    """The module of what a hook calls, whatever wraps it."""
    for name in ("hook", "func"):
        hook = getattr(hook, name, hook)
    return getattr(hook, "__module__", "")
