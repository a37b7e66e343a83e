"""Turning a model into one that trains subnets: one pass that swaps layers, and one that freezes the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from losia_dist.config.losia_config import LoSiAConfig, matches
from losia_dist.errors import ConfigError
from losia_dist.formulas import subnet_size
from losia_dist.subnet.drawn import draw_subnet
from losia_dist.subnet.kinds import BlockAccess, read_subnet, whole_shape
from losia_dist.subnet.linear import SubnetLinear, TiedSubnetEmbedding, can_share_subnet
from losia_dist.subnet.site import Site
from losia_dist.subnet.targets import Target, find_targets, saved_modules


def convert(model: nn.Module, config: LoSiAConfig, access: BlockAccess, subnet_dtype: torch.dtype | None = None) -> None:
    """Give every target layer a subnet and freeze everything else that the configuration does not train. In place.

    Everything that can be refused is refused before the model is touched.
    """
    targets = find_targets(model, config, access.shape)
    _check_pattern(config, targets)
    shapes = {target.name: whole_shape(access, target.module) for target in targets}
    sizes = {target.name: _subnet_shape(target, shapes[target.name], config) for target in targets}
    embeddings = {target.name: _tied_embedding(model, target) for target in targets}
    trained_in_full = _trained_in_full(model, config, targets)
    for target in targets:
        _check_dtype(target, subnet_dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target in targets:
        weight = target.module.weight
        rows, columns = draw_subnet(target.name, shapes[target.name], sizes[target.name], config.seed)
        rows, columns = rows.to(weight.device), columns.to(weight.device)
        values = read_subnet(access, target.module, rows, columns)
        site = SubnetLinear.adopt(
            target.module,
            name=target.name,
            group_name=target.group_name,
            is_output=target.is_output,
            shape=shapes[target.name],
            rows=rows,
            columns=columns,
            values=values if subnet_dtype is None else values.to(subnet_dtype),
            asked_dtype=subnet_dtype,
        )
        site.converted_with = shapes  # one object of all sites, so that any of them knows what there was
        embedding = embeddings[target.name]
        if embedding is not None:
            TiedSubnetEmbedding.adopt(embedding, target.module)
    for parameter in trained_in_full:
        parameter.requires_grad_(True)


def find_sites(model: nn.Module) -> list[Site]:
    """Every site of a model (wrapped or not), in localization order."""
    sites = [module.site for module in model.modules() if isinstance(module, SubnetLinear)]
    order = {name: place for place, name in enumerate(dict.fromkeys(site.group_name for site in sites))}
    return sorted(sites, key=lambda site: (site.is_output, order[site.group_name]))


def group_names(sites: Sequence[Site]) -> list[str]:
    """Names of the groups of these sites, in localization order."""
    return list(dict.fromkeys(site.group_name for site in sites))


def _check_pattern(config: LoSiAConfig, targets: list[Target]) -> None:
    inner = [target.name for target in targets if not target.is_output]
    for name in config.rank_pattern or {}:
        if not any(matches(name, module) for module in inner):
            raise ConfigError(
                f"rank_pattern names {name!r}, which no target layer is called or ends with. Target layers: {inner[0]}, ... "
                "Give a full module name, or its last parts after a dot."
            )


def _subnet_shape(target: Target, shape: tuple[int, int], config: LoSiAConfig) -> tuple[int, int]:
    if target.is_output:
        assert config.output_rank_factor is not None
        factors, option = (config.output_rank_factor, 1.0), "output_rank_factor"
    else:
        factors, option = config.factors_of(target.name), "rank_factor"
    rows, columns = (subnet_size(size, factor) for size, factor in zip(shape, factors, strict=True))
    for what, size, factor, chosen in zip(("row", "column"), shape, factors, (rows, columns), strict=True):
        if chosen < 1:
            raise ConfigError(
                f"{option}={factor} leaves layer {target.name!r} ({shape[0]} x {shape[1]}) no {what}: at least 1/{size} is "
                f"needed. Raise {option}, leave the layer out of target_modules, or train it in full by modules_to_save."
            )
    return rows, columns


def _check_dtype(target: Target, subnet_dtype: torch.dtype | None) -> None:
    dtype = target.module.weight.dtype
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
        if module is not target.module and getattr(module, "weight", None) is target.module.weight
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
    taken = {id(target.module.weight): target.name for target in targets}
    parameters = []
    for name in dict.fromkeys(chosen):
        for parameter in names[name].parameters():
            if id(parameter) in taken:
                raise ConfigError(
                    f"module {name!r} is to be trained in full, but its weight already trains by a subnet (layer "
                    f"{taken[id(parameter)]!r}). Choose one of the two."
                )
            parameters.append(parameter)
    return parameters
