"""Turning a model into one that trains subnets: one pass that swaps layers, and one that freezes the rest."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.formulas import subnet_size
from losia_dist.subnet.linear import SubnetLinear, TiedSubnetEmbedding
from losia_dist.subnet.targets import Target, find_targets, match_names

# Reads weight[rows][:, columns] of a possibly sharded weight, on every rank.
ReadBlock = Callable[[Tensor, Tensor, Tensor], Tensor]
WeightShape = Callable[[Tensor], tuple[int, int]]


def convert(model: nn.Module, config: LoSiAConfig, read_block: ReadBlock, weight_shape: WeightShape) -> None:
    """Give every target layer a subnet and freeze everything else that the configuration does not train. In place."""
    targets = find_targets(model, config)
    sizes = {target.name: _subnet_shape(target, weight_shape(target.module.weight), config) for target in targets}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target in targets:
        embedding = _tied_embedding(model, target)
        _adopt(target, sizes[target.name], config, read_block, weight_shape)
        if embedding is not None:
            assert isinstance(target.module, SubnetLinear)
            TiedSubnetEmbedding.adopt(embedding, target.module)
    _unfreeze(model, config)


def subnet_layers(model: nn.Module) -> list[SubnetLinear]:
    """Every SubnetLinear of a model (wrapped or not), in localization order."""
    layers = [module for module in model.modules() if isinstance(module, SubnetLinear)]
    order = {name: place for place, name in enumerate(dict.fromkeys(layer.group_name for layer in layers))}
    return sorted(layers, key=lambda layer: (layer.is_output, order[layer.group_name]))


def group_names(layers: list[SubnetLinear]) -> list[str]:
    """Names of the groups of these layers, in localization order."""
    return list(dict.fromkeys(layer.group_name for layer in layers))


def _subnet_shape(target: Target, shape: tuple[int, int], config: LoSiAConfig) -> tuple[int, int]:
    if target.is_output:
        assert config.output_rank_factor is not None
        factors, option = (config.output_rank_factor, 1.0), "output_rank_factor"
    else:
        factors, option = (config.row_factor, config.column_factor), "rank_factor"
    rows, columns = (subnet_size(size, factor) for size, factor in zip(shape, factors, strict=True))
    for what, size, factor, chosen in zip(("row", "column"), shape, factors, (rows, columns), strict=True):
        if chosen < 1:
            raise ConfigError(
                f"{option}={factor} leaves layer {target.name!r} ({shape[0]} x {shape[1]}) no {what}: at least 1/{size} is "
                f"needed. Raise {option}, or leave the layer out of target_modules."
            )
    return rows, columns


def _adopt(
    target: Target, size: tuple[int, int], config: LoSiAConfig, read_block: ReadBlock, weight_shape: WeightShape
) -> None:
    weight = target.module.weight
    shape = weight_shape(weight)
    # Seeded by name, so that which layers are targets does not change the subnet of any one of them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{target.name}".encode()))
    rows, columns = (
        torch.randperm(total, generator=generator)[:kept].sort().values.to(weight.device)
        for total, kept in zip(shape, size, strict=True)
    )
    values = read_block(weight, rows, columns)
    SubnetLinear.adopt(
        target.module,
        name=target.name,
        group_name=target.group_name,
        is_output=target.is_output,
        shape=shape,
        rows=rows,
        columns=columns,
        values=values,
    )


def _tied_embedding(model: nn.Module, target: Target) -> nn.Embedding | None:
    """The embedding that shares the weight of an output layer that is about to train, or None."""
    sharing = [m for m in model.modules() if m is not target.module and getattr(m, "weight", None) is target.module.weight]
    if not sharing:
        return None
    embedding = sharing[0]
    if len(sharing) > 1 or type(embedding).forward is not nn.Embedding.forward:
        kinds = ", ".join(type(module).__name__ for module in sharing)
        raise ConfigError(
            f"the weight of {target.name!r} is shared with {kinds}; a subnet in a shared weight is supported for a plain "
            "torch.nn.Embedding and the output layer only. Leave the layer out (output_rank_factor=null), or untie it."
        )
    assert isinstance(embedding, nn.Embedding)
    return embedding


def _unfreeze(model: nn.Module, config: LoSiAConfig) -> None:
    names = dict(model.named_modules())
    chosen = match_names([name for name in names if name], config.modules_to_save or [], "modules_to_save")
    if config.train_norms:
        norms = [name for name, module in names.items() if "norm" in type(module).__name__.lower()]
        if not norms:
            raise ConfigError(f"train_norms=true, but {type(model).__name__} has no normalization layer.")
        chosen += norms
    if config.train_embeddings:
        get_input = getattr(model, "get_input_embeddings", None)
        module = get_input() if callable(get_input) else None
        if module is None:
            raise ConfigError(f"train_embeddings=true, but {type(model).__name__} names no input embedding.")
        chosen += [name for name, candidate in names.items() if candidate is module]
    frozen_weights = {id(layer.weight): layer.name for layer in subnet_layers(model)}
    for name in dict.fromkeys(chosen):
        for parameter in names[name].parameters():
            if id(parameter) in frozen_weights:
                raise ConfigError(
                    f"module {name!r} is to be trained in full, but its weight already trains by a subnet (layer "
                    f"{frozen_weights[id(parameter)]!r}). Choose one of the two."
                )
            parameter.requires_grad_(True)
