"""`get_losia_model`: the one call that turns a model into a LoSiA model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.convert import convert, subnet_layers

Model = TypeVar("Model", bound=nn.Module)


def get_losia_model(model: Model, config: LoSiAConfig) -> Model:
    """Swap the target linear layers for `SubnetLinear` and freeze the rest, in place; returns the same model.

    Call on every rank with the same configuration, before DDP, DeepSpeed or an optimizer sees the model. A model that was
    built under `deepspeed.zero.Init` (weights already partitioned) is converted shard by shard.

    Raises:
        ConfigError: no linear layer, unknown target names, or a rank factor that leaves a layer no row or column.
    """
    if subnet_layers(model):
        raise ConfigError("the model already has subnets: get_losia_model is called once per model.")
    access = resolve_parameters(model)

    def weight_shape(weight: Tensor) -> tuple[int, int]:
        rows, columns = access.shape(weight)
        return rows, columns

    convert(model, config, access.read_block, weight_shape)
    checkpointing = getattr(model, "is_activation_checkpointing", None)  # Transformers 5; older releases have the other
    if checkpointing is None:
        checkpointing = getattr(model, "is_gradient_checkpointing", False)
    let_inputs_ask: Any = getattr(model, "enable_input_require_grads", None)
    if checkpointing and let_inputs_ask is not None:
        # Reentrant checkpointing gives a layer gradients only if its input asks for one; the embedding is frozen now.
        let_inputs_ask()
    return model
