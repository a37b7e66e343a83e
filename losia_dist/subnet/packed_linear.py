"""`PackedLinear`: a linear layer over a quantized weight that this library reads. Frozen, until it gets a subnet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.subnet.autocast import autocast_dtype
from losia_dist.subnet.expert_weights import expert_weights
from losia_dist.subnet.overlay import check_form
from losia_dist.subnet.packed import PackedWeight, packed_of
from losia_dist.subnet.packed_kinds import pack

_logger = logging.getLogger(__name__)

_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")
_OWN = ("quant_state", "compute_dtype", "compute_type_is_set", "quant_storage", "state", "index", "forward")


class PackedLinear(nn.Linear):
    """y = x W^T + b, with W [m, n] made dense for the time of the product, and again for dx. W gets no gradient."""

    packed: PackedWeight
    compute: Any

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = autocast_dtype(device, True)
        if dtype is None:
            return self.compute(input, self)
        with torch.autocast(device, enabled=False):
            return self.compute(input.to(dtype), self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.packed.kind}"


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


class _FrozenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.codes, ctx.packed = codes, packed  # references: a sharded engine empties the tensor, and fills it again
        return functional.linear(x, packed.dense(codes, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_y @ ctx.packed.dense(ctx.codes, grad_y.dtype) if needs_x else None
        return grad_x, None, grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if needs_bias else None, None


def _frozen(x: Tensor, layer: PackedLinear) -> Tensor:
    return _FrozenFunction.apply(x, layer.weight, layer.bias, layer.packed)  # type: ignore[no-any-return]


def _of_quantizer(rule: Any) -> bool:
    """Whether one of Transformers' rules puts together the codes and scales that a file holds of one weight."""
    return any(type(step).__module__.startswith("transformers.integrations.") for step in getattr(rule, "operations", ()))


def adopt_quantized(model: nn.Module, retired: str | None, seed: int) -> Callable[[], None]:
    """Turn every quantized linear layer of a known kind into a `PackedLinear`, in place; returns what undoes it.

    The codes become an ordinary frozen parameter, without a copy, and the model no longer counts as quantized, so that engines
    and trainers treat it as any other. Each rank by itself, before any engine sees the model.

    Args:
        retired, seed: of `LoSiAConfig`.

    Raises:
        UnsupportedError: codes in a state that cannot be read. Nothing was changed.
        ConfigError: the form of `retired` needs a package that is not installed.
    """
    floating = [p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    dtype = floating[0] if floating else torch.float32
    found: list[tuple[str, Any, PackedWeight, Tensor]] = []
    for name, module in model.named_modules():
        try:
            known = None if packed_of(module) is not None else pack(module, retired, dtype)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from error
        if known is not None:
            found.append((name, module, *known))
    for form in {packed.overlay.form for _, _, packed, _ in found if packed.overlay is not None}:
        check_form(form)
    if retired is not None and not found:
        raise ConfigError(f"retired={retired!r}, but the model has no quantized layer that this library reads: leave it out.")
    before = [(module, type(module), dict(module.__dict__), dict(module._parameters)) for _, module, _, _ in found]
    marks = dict(model.__dict__)
    config: Any = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    eager = torch.compiler.disable(_frozen) if found else None  # not above: torch.compiler imports for a second
    for name, module, packed, codes in found:
        module.__class__ = PackedLinear
        for attribute in _OWN:
            module.__dict__.pop(attribute, None)
        for parameter in [name for name in module._parameters if name not in ("weight", "bias")]:
            del module._parameters[parameter]  # the scales of FP8, which `packed` holds
        module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        packed.seed = f"{seed}/{name}"
        module.__dict__["packed"] = packed
        module.__dict__["compute"] = eager  # until a subnet takes the module over
    if found:
        _tell_of_experts(model)
        for mark in _MARKS:
            model.__dict__.pop(mark, None)
        if "_weight_conversions" in marks:  # rules that saving would reverse; those of the quantizer have no reverse
            model._weight_conversions = [rule for rule in marks["_weight_conversions"] if not _of_quantizer(rule)]  # type: ignore
        if settings is not None:
            del config.quantization_config

    def undo() -> None:
        for module, kind, attributes, parameters in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
        model.__dict__.update({mark: marks[mark] for mark in (*_MARKS, "_weight_conversions") if mark in marks})
        if found and settings is not None:
            config.quantization_config = settings

    return undo
