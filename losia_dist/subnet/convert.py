"""Turning a model into one that trains subnets: one pass that swaps layers, and one that freezes the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from losia_dist.config.losia_config import LoSiAConfig, matches
from losia_dist.errors import ConfigError, UnsupportedError, some
from losia_dist.formulas import subnet_size
from losia_dist.subnet.access import BlockAccess, read_subnet, whole_shape
from losia_dist.subnet.drawn import Draw
from losia_dist.subnet.expert_weights import expert_weights, router_modules
from losia_dist.subnet.experts import add_expert_site
from losia_dist.subnet.float8 import STEP, has_float8_sizes
from losia_dist.subnet.linear import SubnetLinear, TiedSubnetEmbedding, can_share_subnet
from losia_dist.subnet.listed_experts import watch_listed
from losia_dist.subnet.packed import packed_weights
from losia_dist.subnet.routers import mark_router
from losia_dist.subnet.site import Site, matrix_names
from losia_dist.subnet.targets import Target, find_targets, in_localization_order, saved_modules

_logger = logging.getLogger(__name__)


def convert(model: nn.Module, config: LoSiAConfig, access: BlockAccess, subnet_dtype: torch.dtype | None = None) -> None:
    """Give every target a subnet and freeze everything else that the configuration does not train. In place.

    Everything that can be refused is refused before the model is touched.
    """
    targets = find_targets(model, config, access.shape)
    _check_pattern(config, targets)
    shapes = {target.name: whole_shape(access, target) for target in targets}
    sizes = {target.name: _subnet_shape(target, shapes[target.name], config) for target in targets}
    _refuse_shared_experts(model, targets)
    _refuse_old_torch(targets)
    embeddings = {target.name: _tied_embedding(model, target) for target in targets}
    trained_in_full = _trained_in_full(model, config, targets)
    routers = _routers(model, config, access)
    for target in targets:
        _check_dtype(target, access.dtype(target.weight), subnet_dtype)
    in_float8 = _in_float8(targets, shapes, config, access)
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites = []
    for target in targets:
        site = _make_site(target, shapes[target.name], sizes[target.name], Draw.of(config), access, subnet_dtype)
        sites.append(site)
        site.in_float8 = target.name in in_float8
        site.converted_with = shapes  # one object of all sites, so that any of them knows what there was
        embedding = embeddings[target.name]
        if embedding is not None:
            TiedSubnetEmbedding.adopt(embedding, target.module)
    watch_listed(model, sites)
    for parameter in trained_in_full:
        parameter.requires_grad_(True)
    for router in routers:
        mark_router(router, frozen)


def _in_float8(targets: list[Target], shapes: dict[str, tuple[int, int]], config: LoSiAConfig, access: BlockAccess) -> set[str]:
    """Names of the layers that compute in FP8, if any are to; those that do not are told in the log."""
    if config.weight_products is None:
        return set()
    why: dict[str, list[str]] = {}
    chosen = []
    for target in targets:
        if target.layout.experts is not None:
            why.setdefault("experts in a fused weight", []).append(target.name)
        elif target.is_output:
            why.setdefault("the output layer, whose results enter the loss", []).append(target.name)
        elif not has_float8_sizes(*shapes[target.name], access.dtype(target.weight)):
            why.setdefault(f"sizes that {STEP} does not divide, or a dtype besides bf16 and fp32", []).append(target.name)
        else:
            chosen.append(target.name)
    if not chosen:
        reasons = "; ".join(f"{reason}: {some(names, 1)}" for reason, names in why.items())
        raise ConfigError(
            f"weight_products={config.weight_products!r}, but no target layer can compute so ({reasons}): leave it out."
        )
    for reason, names in why.items():
        _logger.warning("weight_products=fp8 leaves out %s (%d in all): %s", some(names, 3), len(names), reason)
    return set(chosen)


def _refuse_old_torch(targets: list[Target]) -> None:
    experts = [target.weight_name for target in targets if target.layout.experts is not None]
    if experts and not hasattr(functional, "grouped_mm"):
        raise UnsupportedError(
            f"the experts of {experts[0]!r} need torch.nn.functional.grouped_mm, and torch {torch.__version__} has none: "
            "install torch 2.10 or newer, or give target_modules without experts."
        )


def _make_site(
    target: Target,
    shape: tuple[int, int],
    size: tuple[int, int],
    draw: Draw,
    access: BlockAccess,
    subnet_dtype: torch.dtype | None,
) -> Site:
    device = target.weight.device
    names = matrix_names(target.weight_name, target.layout)
    linear = target.layout.experts is None
    rows, columns = draw.subnets(names, shape, size, linear=linear)
    if linear:
        rows, columns = rows[0], columns[0]
    rows, columns = rows.to(device), columns.to(device)
    values = read_subnet(access, target, rows, columns)
    values = values if subnet_dtype is None else values.to(subnet_dtype)
    place: Any = {
        "name": target.name,
        "group_name": target.group_name,
        "shape": shape,
        "rows": rows,
        "columns": columns,
        "values": values,
        "asked_dtype": subnet_dtype,
    }
    if linear:
        return SubnetLinear.adopt(target.module, is_output=target.is_output, **place)
    return add_expert_site(
        target.owner,
        target.module,
        parameter=target.parameter,
        part=target.part,
        layout=target.layout,
        weight_name=target.weight_name,
        **place,
    )


def find_sites(model: nn.Module) -> list[Site]:
    """Every site of a model (wrapped or not), in localization order."""
    return in_localization_order(site for module in model.modules() for site in module.__dict__.get("sites", ()))


def group_names(sites: Sequence[Site]) -> list[str]:
    """Names of the groups of these sites, in localization order."""
    return list(dict.fromkeys(site.group_name for site in sites))


def _check_pattern(config: LoSiAConfig, targets: list[Target]) -> None:
    inner = [target.weight_name for target in targets if not target.is_output]
    for name in config.rank_pattern or {}:
        if not any(matches(name, module) for module in inner):
            raise ConfigError(
                f"rank_pattern names {name!r}, which no target is called or ends with. Target layers: {inner[0]}, ... "
                "Give a full module name, or its last parts after a dot."
            )


def _subnet_shape(target: Target, shape: tuple[int, int], config: LoSiAConfig) -> tuple[int, int]:
    if target.is_output:
        assert config.output_rank_factor is not None
        factors, option = (config.output_rank_factor, 1.0), "output_rank_factor"
    else:
        factors, option = config.factors_of(target.weight_name), "rank_factor"
    rows, columns = (subnet_size(size, factor) for size, factor in zip(shape, factors, strict=True))
    for what, size, factor, chosen in zip(("row", "column"), shape, factors, (rows, columns), strict=True):
        if chosen < 1:
            raise ConfigError(
                f"{option}={factor} leaves layer {target.name!r} ({shape[0]} x {shape[1]}) no {what}: at least 1/{size} is "
                f"needed. Raise {option}, leave the layer out of target_modules, or train it in full by modules_to_save."
            )
    return rows, columns


def _check_dtype(target: Target, dtype: torch.dtype, subnet_dtype: torch.dtype | None) -> None:
    """dtype: of the weight's values."""
    if subnet_dtype is None:
        return
    if not subnet_dtype.is_floating_point or torch.promote_types(dtype, subnet_dtype) != subnet_dtype:
        raise ConfigError(
            f"subnet_dtype={subnet_dtype}: {target.name!r} has {dtype} weights, which it cannot hold exactly. Use "
            "torch.float32, or leave subnet_dtype out to keep the weight's dtype."
        )


def _tied_embedding(model: nn.Module, target: Target) -> nn.Embedding | None:
    """The embedding that shares the weight of an output layer that is about to train, or None."""
    sharing = {
        name: module
        for name, module in model.named_modules()
        if module is not target.module and getattr(module, "weight", None) is target.weight
    }
    if not sharing:
        return None
    embedding = next(iter(sharing.values()))
    if len(sharing) > 1 or not target.is_output or not can_share_subnet(embedding):
        kinds = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in sharing.items())
        option = "output_rank_factor=null" if target.is_output else "target_modules"
        raise ConfigError(
            f"the weight of {target.name!r} is shared with {kinds}; a subnet in a shared weight is supported for the output "
            f"layer and a torch.nn.Embedding only. Leave the layer out ({option}), or give it a weight of its own."
        )
    assert isinstance(embedding, nn.Embedding)
    return embedding


def _refuse_shared_experts(model: nn.Module, targets: list[Target]) -> None:
    """A fused weight that several modules hold: the subnets of one would not be those of the other."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{name}")
    for target in targets:
        names = holders.get(id(target.weight), [])
        if target.layout.experts is not None and len(names) > 1:
            raise ConfigError(
                f"the experts {names[0]!r} and {names[1]!r} share a weight; a subnet in a shared weight is supported for the "
                "output layer and a torch.nn.Embedding only. Share the module instead, give each a weight of its own, or leave "
                "them out of target_modules."
            )


def _routers(model: nn.Module, config: LoSiAConfig, access: BlockAccess) -> list[nn.Module]:
    """Routers that train in full; none unless they are asked for."""
    if config.router_lr_scale is None:
        return []
    found = router_modules(model, expert_weights(model, access.shape), access.shape)
    if not found:
        raise ConfigError(
            f"router_lr_scale={config.router_lr_scale}, but {type(model).__name__} has no router that is known. Leave "
            "router_lr_scale out, or name what is to train in modules_to_save."
        )
    saved = saved_modules(model, config)
    both = [name for name in found if any(f"{name}.".startswith(f"{one}.") or one.startswith(f"{name}.") for one in saved)]
    if both:
        raise ConfigError(
            f"router_lr_scale={config.router_lr_scale} and modules_to_save both name {both[0]!r}, with rates of their own. "
            "Choose one."
        )
    return list(found.values())


def _trained_in_full(model: nn.Module, config: LoSiAConfig, targets: list[Target]) -> list[nn.Parameter]:
    names = dict(model.named_modules())
    chosen = saved_modules(model, config)
    if config.train_norms:
        norms = [name for name, module in names.items() if "norm" in type(module).__name__.lower()]
        if not norms:
            raise ConfigError(f"train_norms=true, but {type(model).__name__} has no normalization layer.")
        chosen += norms
    if config.train_embeddings:
        get_input: Any = getattr(model, "get_input_embeddings", None)
        module = get_input() if callable(get_input) else None
        if module is None:
            raise ConfigError(f"train_embeddings=true, but {type(model).__name__} names no input embedding.")
        chosen += [name for name, candidate in names.items() if candidate is module]
    taken = {id(target.weight): target.weight_name for target in targets}
    codes = {id(one.weight): name for name, one in packed_weights(model).items()}
    parameters = []
    for name in dict.fromkeys(chosen):
        for parameter in names[name].parameters():
            if id(parameter) in taken:
                raise ConfigError(
                    f"module {name!r} is to be trained in full, but its weight already trains by a subnet (layer "
                    f"{taken[id(parameter)]!r}). Choose one of the two."
                )
            if id(parameter) in codes:
                raise ConfigError(
                    f"module {name!r} is to be trained in full, but {codes[id(parameter)]!r} is quantized, and codes do not "
                    "train. Give it a subnet (target_modules), or load it unquantized (llm_int8_skip_modules in "
                    "BitsAndBytesConfig)."
                )
            parameters.append(parameter)
    return parameters
