"""Which parameters hold the experts of a mixture, how each stores them, and into what parts they are cut for localization."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from losia_dist.subnet.kinds import is_packed
from losia_dist.subnet.layout import Layout

Shape = Callable[[Tensor], tuple[int, ...]]

_ROUTER = re.compile(r"gate|.*_gate|.*router.*")


class ExpertWeight(NamedTuple):
    """A parameter that holds a matrix of each expert.

    name: full name of the parameter. module: that holds it. parameter: its name there. layout: of all experts. owner: the
    module whose forward computes with it (DBRX keeps weights in a module of their own). block: full name of the module that it
    is in.
    """

    name: str
    module: Any
    parameter: str
    layout: Layout
    owner: Any
    block: str


def expert_weights(model: nn.Module, shape: Shape) -> dict[str, ExpertWeight]:
    """The weights of all experts that can hold subnets, by full name, in the model's order.

    shape: the whole shape of a parameter that an engine may have sharded.
    """
    found: dict[str, ExpertWeight] = {}
    for path, module in model.named_modules():
        for holder, parameter, layout in weights_of(module):
            if not layout.stacked and len(shape(getattr(holder, parameter))) != 3:
                continue
            place = path if holder is module else f"{path}.{_child_name(module, holder)}"
            name = f"{place}.{parameter}"
            found[name] = ExpertWeight(name, holder, parameter, layout, module, path.rpartition(".")[0])
    return found


def why_unusable_experts(module: Any) -> str | None:
    """Why experts cannot hold subnets though their class can, as the end of a sentence ("it ..."), or None."""
    read: dict[str, Any] = module.__dict__.get("packed_weights", {})  # codes that this library computes with
    why = None if read else why_unfollowed(module)
    if why is not None:
        return why
    packed = [name for name, parameter in module.named_parameters() if is_packed(parameter) and name not in read]
    return f"has a quantized weight ({packed[0]}): load the model unquantized" if packed else None


def why_unfollowed(module: Any) -> str | None:
    """Why experts that compute by a forward of this library would not compute what they do now, as above."""
    if getattr(module, "_is_expert_parallel", False):
        return "is spread over ranks already (expert parallelism): use losia_dist.load_distributed_model, which converts before"
    if "forward" in vars(module):
        return "has its forward replaced on the object (device_map and offloading hooks do that): load without device_map"
    if not _has_known_forward(module):
        return "computes by a forward of its own, which subnets would not follow: leave the experts out of target_modules"
    return None


def is_router(name: str, blocks: set[str]) -> bool:
    """Whether a module of this full name chooses or weighs experts: a few rows that decide where every token goes.

    blocks: full names of the modules that hold experts.
    """
    return any(
        _ROUTER.fullmatch(part)
        for block in blocks
        if name.startswith(f"{block}.") or not block
        for part in name.removeprefix(block).split(".")
    )


def router_modules(model: nn.Module, experts: dict[str, ExpertWeight], shape: Shape) -> dict[str, nn.Module]:
    """Routers by full name: the outermost modules of that kind with a tensor that has a row for each expert."""
    found: dict[str, nn.Module] = {}
    blocks = {one.block for one in experts.values()}
    counts = {one.layout.count for one in experts.values()}
    owners = {id(one.owner) for one in experts.values()}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        has_row_each = any(shape(parameter)[:1] and shape(parameter)[0] in counts for parameter in module.parameters())
        if id(module) not in owners and not inside and has_row_each and is_router(name, blocks):
            found[name] = module
    return found


def is_routed(module: Any) -> bool:
    """Experts with the forward that Transformers has for nearly all: (tokens [t, n], expert of each [t, k], weights [t, k])."""
    has_both = _has(module, "down_proj") and (_has(module, "gate_up_proj") or _has(module, "up_proj"))
    return hasattr(module, "_apply_gate") and hasattr(module, "num_experts") and has_both


def _has(module: Any, parameter: str) -> bool:
    """Whether a module has a parameter, which may be computed from another tensor (a quantizer's parametrization)."""
    if module._parameters.get(parameter) is not None:
        return True
    return "parametrizations" in module._modules and parameter in module._modules["parametrizations"]


def is_of(module: Any, family: str, name: str) -> bool:
    """Whether a module is of Transformers' class of this name, in a family whose code is loaded."""
    found = getattr(sys.modules.get(f"transformers.models.{family}.modeling_{family}"), name, None)
    return found is not None and isinstance(module, found)


def _has_known_forward(module: Any) -> bool:
    """Whether it computes as Transformers has it: a subclass may keep all else and compute in another way.

    `use_experts_implementation` puts a forward of Transformers' own in the place of the one that a class brings.
    """
    where: str = getattr(type(module).forward, "__globals__", {}).get("__name__", "")
    return where.startswith("transformers.")


def weights_of(module: Any) -> list[tuple[Any, str, Layout]]:
    """(holder, parameter, layout of all experts) of what a module of experts computes with; nothing for other modules."""
    if is_routed(module):
        up = "gate_up_proj" if _has(module, "gate_up_proj") else "up_proj"
        layout = Layout(bool(getattr(module, "is_transposed", False)), (0, module.num_experts))
        return [(module, name, layout) for name in (up, "down_proj")]
    if is_of(module, "llama4", "Llama4TextExperts"):
        return [(module, name, Layout(True, (0, module.num_experts))) for name in ("gate_up_proj", "down_proj")]
    if is_of(module, "dbrx", "DbrxExperts"):
        count = module.num_experts
        return [(module.mlp, name, Layout(name == "w2", (0, count), count)) for name in ("w1", "v1", "w2")]
    return []


def _child_name(module: nn.Module, child: nn.Module) -> str:
    return next(name for name, candidate in module.named_children() if candidate is child)
