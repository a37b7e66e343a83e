"""Names of everything a checkpoint holds, the same on every engine: those of the plain model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from losia_dist.run.conductor import LoSiA
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.packed import PackedParameter, packed_weights
from losia_dist.subnet.site import Site

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Contents:
    """A converted model's tensors by name. Parameters that several names share stand under the first one.

    Attributes:
        weights: parameters that do not train, target weights among them: what base/ holds.
        trained: parameters that train: the subnets ("<site>.subnet") and whatever else.
        buffers: persistent buffers but the subnets' indices.
        sites: name of a site -> the site; that of a linear layer is the layer's.
        weight_of: name of a site -> the name of its weight.
        quantized: name of a layer, or of experts' weight -> the parameter, of those stored as codes; that is in no other list.
        aliases: further names of a shared parameter or buffer -> the first one.
    """

    weights: dict[str, nn.Parameter]
    trained: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    sites: dict[str, Site]
    weight_of: dict[str, str]
    quantized: dict[str, PackedParameter]
    aliases: dict[str, str]


def contents_of(losia: LoSiA) -> Contents:
    """The contents of a conductor's model; touches no data and speaks to no rank."""
    model = unwrap(losia.model)
    sites = {site.name: site for site in losia.sites}
    subnets = {id(site.subnet): f"{name}.subnet" for name, site in sites.items()}
    weights: dict[str, nn.Parameter] = {}
    trained: dict[str, nn.Parameter] = {name: sites[name.removesuffix(".subnet")].subnet for name in subnets.values()}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    quantized = {plain_name(name): one for name, one in packed_weights(model).items()}
    codes = {id(one.weight) for one in quantized.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(name)
        if id(parameter) in subnets:
            continue
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        if id(parameter) in codes:
            continue
        (trained if parameter.requires_grad else weights)[name] = parameter
    buffers = _persistent_buffers(model)
    weight_of = {name: first[id(site.weight)] for name, site in sites.items()}
    return Contents(weights, trained, buffers, sites, weight_of, quantized, aliases)


def plain_entries(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors of a plain model's state dict but this package's own, under all of their names; the same order on every rank."""
    wanted = set(model.state_dict(keep_vars=True))
    own = {id(tensor) for site in find_sites(model) for tensor in (site.subnet, site.row_index, site.col_index)}
    return [
        (name, tensor)
        for source in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, tensor in source
        if name in wanted and id(tensor) not in own
    ]


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrapping modules add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrap(model: Any) -> nn.Module:
    """The plain model inside DDP, a DeepSpeed engine or torch.compile."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    assert isinstance(model, nn.Module)
    return model


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    indices = {id(index) for site in find_sites(model) for index in (site.row_index, site.col_index)}
    buffers, seen = {}, indices
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                buffers[plain_name(f"{path}.{name}" if path else name)] = buffer
    return buffers
