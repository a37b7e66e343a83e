"""`initialize`: deepspeed.initialize for a LoSiA model, with the same 4-tuple."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.integrations.deepspeed.engine_checkpoint import attach_checkpoints
from losia_dist.model import get_losia_model
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.conductor import LoSiA
from losia_dist.run.finite import refuse_skipped
from losia_dist.sharding.deepspeed_config import read_deepspeed_config, refuse_unsupported
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.groups import losia_parameter_groups

# Arguments of deepspeed.initialize that are passed on; the others are refused with what to do instead.
_PASSED_ON = ("args", "training_data", "collate_fn", "distributed_port", "dist_init_required", "mpu")
_NO_MESH = "LoSiA trains on data parallelism, and on sequence parallelism by sequence_parallel_size or mpu: leave it out"
_REFUSED_ARGUMENTS = {
    "mesh_param": _NO_MESH,
    "model_parameters": "it is chosen by LoSiA (one group per decoder layer): leave it out",
    "config_params": "it is an older name of config: pass config=...",
}


def initialize(
    *,
    model: nn.Module,
    losia_config: LoSiAConfig,
    config: dict[str, Any] | str | Path,
    optimizer: Optimizer | None = None,
    lr: float = 5e-5,
    lr_scheduler: Any | Callable[[Optimizer], Any] | None = None,
    total_steps: int | None = None,
    watch: bool = True,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """Convert the model if it is not yet, and start a DeepSpeed engine whose `step()` drives LoSiA.

    Called on every rank. Stages 0, 1, 2 and 3, fp32 and bf16. The conductor is `engine.losia`.

    Args:
        model: a plain model, or one that `get_losia_model` converted with the same configuration.
        losia_config: the same on every rank; checked before anything else is communicated.
        config: DeepSpeed's configuration, a dictionary or a JSON file (read as DeepSpeed reads it); it is not changed.
        optimizer: built from `losia_parameter_groups(model, ...)`; None: `LoSiAAdamW`, or what the configuration names.
        lr: learning rate where neither an optimizer nor the configuration gives one.
        lr_scheduler: as for deepspeed.initialize: a scheduler, or a callable that takes the optimizer.
        total_steps: optimizer steps of the whole run, for layers_per_slot="auto".
        watch: whether ranks watch each other; see `LoSiA`.
        kwargs: passed on to deepspeed.initialize: args, training_data, collate_fn, distributed_port, dist_init_required, mpu.

    With "sequence_parallel_size" in the configuration (or DeepSpeed's `mpu`) that many neighbouring ranks compute each sequence
    together, by DeepSpeed's Ulysses. Batches are then parts of sequences (`losia_dist.split_sequence`), and the loss is that of
    the whole (`losia_dist.sequence_loss`); "train_batch_size" counts whole sequences. See docs/long-context.md.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler).

    Raises:
        ConfigError: an optimizer (or scheduler) both passed and in the configuration, a value or key that DeepSpeed would not
            take as it is meant, an argument that is not passed on, or ranks that differ.
        UnsupportedError: a DeepSpeed feature that does not work with subnets, with the fix.
    """
    _refuse_arguments(kwargs)
    settings = read_deepspeed_config(config)
    refuse_unsupported(settings)
    in_config = settings.get("optimizer")
    if optimizer is not None and in_config is not None:
        raise ConfigError(
            f'an optimizer was passed ({type(optimizer).__name__}) and the DeepSpeed configuration has an "optimizer" '
            f"({in_config.get('type')}): remove one of the two."
        )
    if lr_scheduler is not None and settings.get("scheduler") is not None:
        raise ConfigError(
            f'a scheduler was passed and the DeepSpeed configuration has a "scheduler" ({settings["scheduler"].get("type")}), '
            "which DeepSpeed would pass over: remove one of the two."
        )
    _check_values(settings)
    mpu, sequence_ranks = kwargs.pop("mpu", None), settings.pop("sequence_parallel_size", 1)
    _check_sequences(sequence_ranks, mpu, kwargs)
    _init_distributed(kwargs)
    agreement = Agreement(dist.group.WORLD, is_own=True)
    agreement.same("the LoSiA configuration", losia_config.to_dict())
    agreement.same("the DeepSpeed configuration", {**settings, "sequence_parallel_size": sequence_ranks})
    mpu = _share_sequences(model, sequence_ranks, mpu)
    if not find_sites(model):
        get_losia_model(model, losia_config)
    arguments: dict[str, Any] = {**kwargs, "mpu": mpu}
    if in_config is not None:
        named = in_config.get("params", {})
        groups = losia_parameter_groups(model, lr=named.get("lr", lr), weight_decay=named.get("weight_decay", 0.0))
        arguments["model_parameters"] = groups  # a group's own values go before the optimizer's
    else:
        arguments["optimizer"] = optimizer or LoSiAAdamW(losia_parameter_groups(model, lr=lr), lr=lr)
        _admit_own_optimizer(settings)
    engine, wrapped, loader, scheduler = _start(model=model, config=settings, lr_scheduler=lr_scheduler, **arguments)
    _check_stage(engine, settings)
    _note_engine(engine)
    engine.losia = LoSiA(
        engine.module, wrapped, losia_config, process_group=engine.seq_data_parallel_group, total_steps=total_steps, watch=watch
    )
    _drive(engine)
    return engine, wrapped, loader, scheduler


def initialize_dense(
    model: nn.Module, config: dict[str, Any], optimizer: Optimizer, lr_scheduler: Any = None
) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize for full fine-tuning with the same optimizer class, to compare LoSiA with."""
    import deepspeed

    settings = read_deepspeed_config(config)
    trained: dict[str, Any] = {"model_parameters": model.parameters()}
    if "optimizer" not in settings:
        trained = {"optimizer": optimizer}
        _admit_own_optimizer(settings)
    return deepspeed.initialize(model=model, config=settings, lr_scheduler=lr_scheduler, **trained)  # type: ignore[no-any-return]


def _refuse_arguments(arguments: dict[str, Any]) -> None:
    """Every argument is used or refused, and none is dropped."""
    for name, instead in _REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            kind = UnsupportedError if instead is _NO_MESH else ConfigError
            raise kind(f"{name}={arguments[name]!r} was passed to initialize: {instead}.")
    unknown = sorted(set(arguments) - {*_PASSED_ON, *_REFUSED_ARGUMENTS})
    if unknown:
        raise ConfigError(f"initialize has no argument {unknown[0]!r}; it passes on {', '.join(_PASSED_ON)}.")
    for name in ("deepspeed_config", "deepscale_config"):
        second = getattr(arguments.get("args"), name, None)
        if second is not None:
            raise ConfigError(f"config was passed, and args.{name} ({second}) too: remove one of the two.")


def _check_values(settings: dict[str, Any]) -> None:
    """Let DeepSpeed look at values and names of the sections that it checks, before any rank waits for another."""
    from deepspeed.runtime.precision_config import get_bfloat16_config
    from deepspeed.runtime.zero.config import get_zero_config

    try:
        get_zero_config(settings)
        get_bfloat16_config(settings)
    except (ValueError, TypeError, AssertionError) as error:  # pydantic's is a ValueError
        raise ConfigError(f"DeepSpeed does not take its configuration: {error}") from error


def _start(**arguments: Any) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize, whose refusals (of all ranks alike) become this package's."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        return deepspeed.initialize(**arguments)  # type: ignore[no-any-return]
    except (AssertionError, ValueError, NotImplementedError, DeepSpeedConfigError, ZeRORuntimeException) as error:
        raise UnsupportedError(f"DeepSpeed does not start with this configuration: {error}") from error


def _check_sequences(ranks: Any, mpu: Any, arguments: dict[str, Any]) -> None:
    """What is asked of sequence parallelism, before anything is communicated."""
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise ConfigError(f'"sequence_parallel_size": {ranks!r} in the DeepSpeed configuration: a number of ranks is needed.')
    if ranks == 1 and mpu is None:
        return
    if mpu is not None and not hasattr(mpu, "get_sequence_parallel_group"):
        raise UnsupportedError(
            f"mpu={mpu!r} was passed to initialize: it has no sequence groups, and LoSiA trains on data parallelism and "
            "sequence parallelism alone. Leave it out; ZeRO cuts the model."
        )
    if arguments.get("training_data") is not None:
        raise UnsupportedError(
            "training_data with sequence parallelism: DeepSpeed's loader gives every rank other records, and cuts none. Load "
            "batches yourself, the same on all ranks of a sequence, and cut them by losia_dist.split_sequence."
        )


def _share_sequences(model: Any, ranks: int, mpu: Any) -> Any:
    """DeepSpeed's mpu, with the model's attention shared; None without sequence parallelism. Called by all ranks."""
    from losia_dist.integrations.deepspeed.ulysses import forget_sequences, share_sequences

    forget_sequences()
    if mpu is not None:
        found = mpu.get_sequence_parallel_world_size()
        if ranks not in (1, found):
            raise ConfigError(
                f'"sequence_parallel_size" is {ranks}, and the mpu that was passed has groups of {found} ranks: leave one of '
                "the "
                "two out."
            )
        ranks = found
    return None if ranks == 1 else share_sequences(model, ranks, mpu)


def _init_distributed(arguments: dict[str, Any]) -> None:
    """As deepspeed.initialize would, whose own call comes too late for what ranks must agree on."""
    import deepspeed

    if not dist.is_initialized():
        port = {"distributed_port": arguments["distributed_port"]} if "distributed_port" in arguments else {}
        deepspeed.init_distributed(dist_init_required=arguments.get("dist_init_required"), **port)


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


def _note_engine(engine: Any) -> None:
    from losia_dist.sharding.handed_over import note_engine  # imports DeepSpeed

    note_engine(engine)


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
