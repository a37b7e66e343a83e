"""Taking a quantized model over: its layers and experts compute by this library, and it counts as an ordinary one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.subnet.expert_weights import expert_weights
from losia_dist.subnet.experts import adopt_packed_experts
from losia_dist.subnet.overlay import check_form
from losia_dist.subnet.packed import PackedWeight
from losia_dist.subnet.packed_experts import pack_experts, strip_quantizer
from losia_dist.subnet.packed_kinds import pack
from losia_dist.subnet.packed_linear import PackedLinear, compute_frozen

_logger = logging.getLogger(__name__)

_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")
_OWN = ("quant_state", "compute_dtype", "compute_type_is_set", "quant_storage", "state", "index", "forward")
_HELD = ("_parameters", "_modules", "_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_state_dict_hooks")


def adopt_quantized(model: nn.Module, retired: str | None, seed: int) -> Callable[[], None]:
    """Turn every quantized linear layer of a known kind into a `PackedLinear`, and quantized experts into ones that compute
    from their codes, in place; returns what undoes it.

    Codes become ordinary frozen parameters, without a copy, and the model no longer counts as quantized, so that engines and
    trainers treat it as any other. Each rank by itself, before any engine sees the model.

    Args:
        retired, seed: of `LoSiAConfig`.

    Raises:
        UnsupportedError: codes in a state that cannot be read, or on several devices. Nothing was changed.
        ConfigError: the form of `retired` needs a package that is not installed.
    """
    layers, experts = _find(model, retired)
    every = [packed for _, _, packed, _ in layers] + [packed for _, _, stored in experts for packed, _ in stored.values()]
    for form in {packed.overlay.form for packed in every if packed.overlay is not None}:
        check_form(form)
    if every:
        _refuse_several_devices(model)
    if retired is not None and not every:
        raise ConfigError(f"retired={retired!r}, but the model has no quantized layer that this library reads: leave it out.")
    put_back = [_memory(module) for _, module, *_ in [*layers, *experts]]
    marks = dict(model.__dict__)
    config: Any = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    eager = torch.compiler.disable(compute_frozen) if layers else None  # not above: torch.compiler imports for a second
    for name, module, packed, codes in layers:
        module.__class__ = PackedLinear
        for attribute in _OWN:
            module.__dict__.pop(attribute, None)
        for parameter in [name for name in module._parameters if name not in ("weight", "bias")]:
            del module._parameters[parameter]  # the scales of FP8, which `packed` holds
        _hold(name, module, {"weight": (packed, codes)}, seed)
        module.__dict__["compute"] = eager  # until a subnet takes the module over
    for name, module, stored in experts:
        strip_quantizer(module, list(stored))
        for parameter, one in stored.items():
            _hold(f"{name}.{parameter}", module, {parameter: one}, seed)
        adopt_packed_experts(module)
    if every:
        _tell_of_experts(model)
        for mark in _MARKS:
            model.__dict__.pop(mark, None)
        if "_weight_conversions" in marks:  # rules that saving would reverse; those of the quantizer have no reverse
            model._weight_conversions = [rule for rule in marks["_weight_conversions"] if not _of_quantizer(rule)]  # type: ignore
        if settings is not None:
            del config.quantization_config

    def undo() -> None:
        for back in put_back:
            back()
        model.__dict__.update({mark: marks[mark] for mark in (*_MARKS, "_weight_conversions") if mark in marks})
        if every and settings is not None:
            config.quantization_config = settings

    return undo


def _find(
    model: nn.Module, retired: str | None
) -> tuple[list[tuple[str, Any, PackedWeight, Tensor]], list[tuple[str, Any, Any]]]:
    """Quantized linear layers and quantized modules of experts, by full name."""
    floating = [p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    dtype = floating[0] if floating else torch.float32
    layers: list[tuple[str, Any, PackedWeight, Tensor]] = []
    experts = []
    for name, module in model.named_modules():
        if "packed_weights" in module.__dict__:
            continue
        try:
            known, stored = pack(module, retired, dtype), pack_experts(module, retired, dtype)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from error
        if known is not None:
            layers.append((name, module, *known))
        if stored:
            experts.append((name, module, stored))
    return layers, experts


def _refuse_several_devices(model: Any) -> None:
    """`device_map` makes modules move their inputs, by hooks that would be lost; subnets of one model are on one device."""
    placed: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    devices = sorted({str(device) for device in placed.values()})
    if len(devices) > 1:
        first = next(name for name, device in placed.items() if str(device) != str(next(iter(placed.values()))))
        raise UnsupportedError(
            f"the quantized model is spread over several devices by device_map ({', '.join(devices)}; {first!r} is not where "
            "the first module is): load it with device_map={'': device}, one process for each GPU, and shard it by FSDP2 or "
            "ZeRO-3 if it does not fit."
        )


def _hold(name: str, module: Any, stored: dict[str, tuple[PackedWeight, Tensor]], seed: int) -> None:
    for parameter, (packed, codes) in stored.items():
        module._parameters[parameter] = nn.Parameter(codes, requires_grad=False)
        packed.seed = f"{seed}/{name}"
        module.__dict__.setdefault("packed_weights", {})[parameter] = packed


def _memory(module: Any) -> Callable[[], None]:
    """What puts a module back as it is now."""
    kind, attributes = type(module), dict(module.__dict__)
    held = {name: dict(attributes[name]) for name in _HELD}

    def put_back() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for name, content in held.items():
            attributes[name].clear()
            attributes[name].update(content)

    return put_back


def _tell_of_experts(model: nn.Module) -> None:
    """Say where most of a model is not quantized with the rest: bitsandbytes leaves experts in fused weights as they are."""
    weights = expert_weights(model, lambda parameter: tuple(parameter.shape))
    if weights:
        size = sum(getattr(one.module, one.parameter).nbytes for one in weights.values())
        _logger.warning(
            "the linear layers are quantized, and the experts in fused weights (%s, ...) are not: they take %.1f GB",
            next(iter(weights)),
            size / 1e9,
        )


def _of_quantizer(rule: Any) -> bool:
    """Whether one of Transformers' rules puts together the codes and scales that a file holds of one weight."""
    return any(type(step).__module__.startswith("transformers.integrations.") for step in getattr(rule, "operations", ()))
