"""Models without values: made on the meta device, and given memory unit by unit when an engine takes them over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losia_dist.errors import ConfigError

# id of a parameter or buffer -> where modules keep it; several places for a shared one.
Holders = dict[int, list[tuple[dict[str, Any], str]]]


class Where(NamedTuple):
    """Where a tensor was put: id of the one it replaced, and the modules' dictionary and name that hold it now."""

    old: int
    kept: dict[str, Any]
    name: str


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside keep their parameters on the meta device, and compute their buffers as usual.

    Buffers (rotary frequencies, say) are in no file, and can only be had from the code that makes the module.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def find_holders(model: nn.Module) -> Holders:
    """Where each parameter and buffer of a model is kept."""
    holders: Holders = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append((kept, name))
    return holders


def give_memory(
    unit: nn.Module,
    device: torch.device,
    holders: Holders,
    *,
    fill: Callable[[Tensor], None] | None = None,
    allocate: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Where]:
    """Replace whatever of a unit is still in `holders` by tensors on the device, one by one; what is shared stays shared.

    Args:
        fill: called with each new tensor, in the modules' order; what was on the meta device is zero until then.
        allocate: memory like that of a parameter on the meta device.

    Yields:
        the place of each, when it has its memory.
    """
    for module in unit.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is None or id(tensor) not in holders:
                continue
            if tensor.is_meta and allocate is not None and isinstance(tensor, nn.Parameter):
                values = allocate(tensor)
            else:
                values = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            if not tensor.is_meta:
                values.copy_(tensor.detach())
            if fill is not None:
                fill(values)
            filled = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
            places = holders.pop(id(tensor))
            for kept, name in places:
                kept[name] = filled
            del values, filled  # an engine that takes it over frees it
            yield Where(id(tensor), *places[0])


def check_buffers(model: nn.Module) -> None:
    """Raises: ConfigError where a buffer has no values, though the model was made with `parameters_on_meta`."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ConfigError(
                f"buffer {name} of {type(model).__name__} was made on the meta device, and has no values to train with."
            )
