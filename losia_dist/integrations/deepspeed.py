"""`initialize`: deepspeed.initialize for a LoSiA model, with the same 4-tuple."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from losia_dist.conductor import LoSiA
from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.guard import check_same_on_all_ranks
from losia_dist.integrations.deepspeed_checkpoint import attach_checkpoints
from losia_dist.model import get_losia_model
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.optim.finite import refuse_skipped
from losia_dist.subnet.convert import subnet_layers
from losia_dist.subnet.groups import losia_parameter_groups

# (path in the DeepSpeed configuration, value that is fine, what to do instead): tested combinations only are let through.
_REFUSED: list[tuple[str, Any, str]] = [
    ("fp16.enabled", False, 'fp16 scales the loss, which would enter the importance; use "bf16": {"enabled": true}'),
    ("amp.enabled", False, 'use "bf16": {"enabled": true}'),
    ("torch_autocast.enabled", False, 'use "bf16": {"enabled": true}'),
    ("zero_optimization.zero_hpz_partition_size", 1, "a second copy of the weights would miss re-localized subnets; remove it"),
    ("zero_optimization.zero_quantized_weights", False, "subnets cannot be written into quantized weights; remove it"),
    ("zero_optimization.zero_quantized_nontrainable_weights", False, "subnets cannot be written into them; remove it"),
    ("zero_optimization.zero_quantized_gradients", False, "not tested with subnets; remove it"),
    ("zero_optimization.mics_shard_size", -1, "MiCS shards are not supported; use plain ZeRO-3"),
    ("zero_optimization.offload_optimizer.device", "cpu", "only offload to the CPU is supported"),
    ("zero_optimization.offload_param.device", "cpu", "only offload to the CPU is supported"),
    ("zero_optimization.zenflow", None, "ZenFlow steps parameters one by one; remove it"),
    ("tensor_parallel.autotp_size", 0, "tensor parallelism cuts the weights; use ZeRO-3 instead"),
    ("sequence_parallel_size", 1, "sequence parallelism is not supported"),
    ("hybrid_engine.enabled", False, "the hybrid engine is not supported"),
]


def initialize(
    *,
    model: nn.Module,
    losia_config: LoSiAConfig,
    config: dict[str, Any] | str | Path,
    optimizer: Optimizer | None = None,
    lr: float = 5e-5,
    lr_scheduler: Any | Callable[[Optimizer], Any] | None = None,
    total_steps: int | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """Convert the model if it is not yet, and start a DeepSpeed engine whose `step()` drives LoSiA.

    Called on every rank. Stages 0, 1, 2 and 3, fp32 and bf16. The conductor is `engine.losia`.

    Args:
        model: a plain model, or one that `get_losia_model` converted with the same configuration.
        losia_config: the same on every rank; checked before anything else is communicated.
        config: DeepSpeed's configuration, a dictionary or a JSON file; it is not changed.
        optimizer: built from `losia_parameter_groups(model, ...)`; None: `LoSiAAdamW`, or what the configuration names.
        lr: learning rate where neither an optimizer nor the configuration gives one.
        lr_scheduler: as for deepspeed.initialize: a scheduler, or a callable that takes the optimizer.
        total_steps: optimizer steps of the whole run, for layers_per_slot="auto".
        kwargs: passed on to deepspeed.initialize (training_data, collate_fn, ...).

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler).

    Raises:
        ConfigError: an optimizer both passed and in the configuration, or ranks that differ.
        UnsupportedError: a DeepSpeed feature that does not work with subnets, with the fix.
    """
    settings = read_deepspeed_config(config)
    refuse_unsupported(settings)
    in_config = settings.get("optimizer")
    if optimizer is not None and in_config is not None:
        raise ConfigError(
            f'an optimizer was passed ({type(optimizer).__name__}) and the DeepSpeed configuration has an "optimizer" '
            f"({in_config.get('type')}): remove one of the two."
        )
    if "model_parameters" in kwargs:
        raise ConfigError("model_parameters is chosen by LoSiA (one group per decoder layer); remove the argument.")

    import deepspeed

    if not dist.is_initialized():
        deepspeed.init_distributed()
    check_same_on_all_ranks("the LoSiA configuration", losia_config.to_dict(), dist.group.WORLD)
    check_same_on_all_ranks("the DeepSpeed configuration", settings, dist.group.WORLD)
    if not subnet_layers(model):
        get_losia_model(model, losia_config)
    arguments: dict[str, Any] = dict(kwargs)
    if in_config is not None:
        named = in_config.get("params", {})
        groups = losia_parameter_groups(model, lr=named.get("lr", lr), weight_decay=named.get("weight_decay", 0.0))
        arguments["model_parameters"] = groups  # a group's own values go before the optimizer's
    else:
        arguments["optimizer"] = optimizer or LoSiAAdamW(losia_parameter_groups(model, lr=lr), lr=lr)
        _admit_own_optimizer(settings)
    engine, wrapped, loader, scheduler = deepspeed.initialize(
        model=model, config=settings, lr_scheduler=lr_scheduler, **arguments
    )
    _check_stage(engine, settings)
    engine.losia = LoSiA(
        engine.module, wrapped, losia_config, process_group=engine.seq_data_parallel_group, total_steps=total_steps
    )
    _drive(engine)
    return engine, wrapped, loader, scheduler


def initialize_dense(
    model: nn.Module, config: dict[str, Any], optimizer: Optimizer, lr_scheduler: Any = None
) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize for full fine-tuning with the same optimizer class, to compare LoSiA with."""
    import deepspeed

    settings = read_deepspeed_config(config)
    if "optimizer" in settings:
        return deepspeed.initialize(
            model=model, config=settings, model_parameters=model.parameters(), lr_scheduler=lr_scheduler
        )
    _admit_own_optimizer(settings)
    return deepspeed.initialize(model=model, config=settings, optimizer=optimizer, lr_scheduler=lr_scheduler)


def read_deepspeed_config(config: dict[str, Any] | str | Path) -> dict[str, Any]:
    """A copy of the configuration as a dictionary.

    Raises:
        ConfigError: the file is missing or not a JSON object.
    """
    if isinstance(config, dict):
        return copy.deepcopy(config)
    try:
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"DeepSpeed configuration {config} cannot be read: {error.strerror}. Check --deepspeed.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"DeepSpeed configuration {config} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"DeepSpeed configuration {config} must be a JSON object.")
    return settings


def refuse_unsupported(settings: dict[str, Any]) -> None:
    """Raise UnsupportedError, with the fix, for what the support matrix refuses. Touches no device and no rank."""
    for path, fine, instead in _REFUSED:
        value: Any = settings
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        off = value is None or value == fine or value in (False, 0, "none") or (path.endswith("autotp_size") and value == 1)
        if not off:
            raise UnsupportedError(
                f'"{path}": {value!r} in the DeepSpeed configuration is not supported with LoSiA: {instead}.'
            )


def _admit_own_optimizer(settings: dict[str, Any]) -> None:
    settings["zero_allow_untested_optimizer"] = True  # DeepSpeed asks for it with any optimizer that is not its own
    settings.setdefault("zero_force_ds_cpu_optimizer", False)


def _check_stage(engine: Any, settings: dict[str, Any]) -> None:
    """Sharding that was asked for must be there."""
    asked = settings.get("zero_optimization", {}).get("stage", 0)
    sharded = all(hasattr(p, "ds_id") for p in engine.module.parameters())
    kind = type(engine.optimizer).__name__
    got = 3 if sharded else (1 if kind == "BF16_Optimizer" else engine.zero_optimization_stage())
    if got != asked or (asked and "Zero" not in kind and kind != "BF16_Optimizer"):
        raise UnsupportedError(f"ZeRO stage {asked} was asked for, but DeepSpeed gave {kind} at stage {got}.")


def _drive(engine: Any) -> None:
    """Let `engine.step()` move the conductor at every accumulation boundary, and its checkpoints carry the conductor."""
    engine_step = engine.step

    def step(*args: Any, **kwargs: Any) -> Any:
        boundary = not engine.managed_gradient_accumulation() or engine.is_gradient_accumulation_boundary()
        result = engine_step(*args, **kwargs)
        if boundary:
            if engine.was_step_applied():
                engine.losia.step()
            else:
                engine.losia.discard_step()
                refuse_skipped(engine.losia.steps + 1)
        return result

    engine.step = step
    attach_checkpoints(engine)
