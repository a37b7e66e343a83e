"""`get_losia_model`: the one call that turns a model into a LoSiA model."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.convert import convert, find_sites
from losia_dist.subnet.quantized import adopt_quantized

Model = TypeVar("Model", bound=nn.Module)


def get_losia_model(model: Model, config: LoSiAConfig, subnet_dtype: torch.dtype | None = None) -> Model:
    """Swap the target linear layers for `SubnetLinear` and freeze the rest, in place; returns the same model.

    Call on every rank with the same configuration, before DDP, DeepSpeed, `fully_shard` or an optimizer sees the model. A
    model that was built under `deepspeed.zero.Init` (weights already partitioned) is converted shard by shard. On the meta
    device only shapes are made; the subnets are cut when `LoSiA(...)` sees the loaded weights.

    `model.save_pretrained` is refused from then on: `export_model` writes the trained model.

    Args:
        model: linear layers are `nn.Linear` and Transformers' `Conv1D`. Of a model of several parts (vision and language),
            "all-linear" takes the language model.
        config: what trains.
        subnet_dtype: dtype of the subnets; None keeps the weight's. torch.float32 over frozen bf16 weights trains fp32 values
            and needs no master copy in the optimizer (FSDP2: `MixedPrecisionPolicy(param_dtype=None,
            reduce_dtype=torch.float32)` keeps it so). DeepSpeed keeps fp32 masters itself: leave it None there.

    Raises:
        ConfigError: no linear layer, unknown target names, a rank factor that leaves a layer no row or column, a weight that
            several layers share, layers that "all-linear" would leave frozen in silence (experts, heads), or a subnet_dtype
            narrower than the weights. The model is then as it was.
    """
    if find_sites(model):
        raise ConfigError("the model already has subnets: get_losia_model is called once per model.")
    undo = adopt_quantized(model, config.retired, config.seed)
    try:
        convert(model, config, resolve_parameters(model), subnet_dtype)
    except BaseException:
        undo()
        raise
    checkpointing = getattr(model, "is_activation_checkpointing", None)  # Transformers 5; older releases have the other
    if checkpointing is None:
        checkpointing = getattr(model, "is_gradient_checkpointing", False)
    let_inputs_ask: Any = getattr(model, "enable_input_require_grads", None)
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    begins_with_experts = any(first is site.subnet for site in find_sites(model) if site.experts is not None)
    if (checkpointing or begins_with_experts) and let_inputs_ask is not None:
        # Reentrant checkpointing gives a layer gradients only if its input asks for one; the embedding is frozen now. So do
        # blocks of experts under ZeRO-3, which are leaf modules there.
        let_inputs_ask()
    holders: list[Any] = [module for module in model.modules() if hasattr(module, "save_pretrained")]
    for holder in holders:  # a model may hold others, with a method of their own
        holder.save_pretrained = _refuse_save_pretrained
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many values train, of how many the plain model has, as PEFT's method of this name does.

    Counts whole parameters under ZeRO-3 and FSDP2 too. Call it on one rank or on all; nothing is communicated.
    """
    subnets = {id(site.subnet) for site in find_sites(model)}
    trainable = count_trainable(model)
    every = sum(_count(parameter) for parameter in model.parameters() if id(parameter) not in subnets)
    print(f"trainable params: {trainable:,} || all params: {every:,} || trainable%: {100 * trainable / every:.4f}")


def count_trainable(model: nn.Module) -> int:
    """Values that train, of whole parameters, however an engine cuts them."""
    return sum(_count(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _count(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> None:
    """In the place of `save_pretrained` of one model; a function of the module, so that the model can be copied."""
    raise UnsupportedError(
        "model.save_pretrained (and push_to_hub, which calls it) would write frozen weights without their subnets' present "
        "values, and LoSiA's own tensors: use losia_dist.export_model(losia, directory), called on all ranks with the "
        "conductor of the run, which consolidates them (losia.consolidate()) and writes a plain model directory."
    )
