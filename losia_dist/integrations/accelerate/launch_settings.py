"""What `accelerate launch` asks for, read from the environment variables that it sets.

A script has its own engines (`losia_dist.recipe`); here the launcher's configuration file becomes their settings, and
what they do not have is refused. Names of the variables: Accelerate 1.15, `accelerate/utils/launch.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from losia_dist.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class LaunchSettings:
    """Settings that came from the launcher; None or empty where it said nothing.

    deepspeed: a DeepSpeed configuration file's path, or settings in the same form. sharding: as `--sharding`.
    layer_classes: class names of the modules to shard one by one. precision: "bf16".
    sequence_ranks: ranks that compute each sequence together, with DeepSpeed.
    gradient_checkpointing: "non-reentrant".
    """

    deepspeed: str | dict[str, Any] | None = None
    sharding: str | None = None
    offload: bool = False
    layer_classes: tuple[str, ...] = ()
    precision: str | None = None
    sequence_ranks: int | None = None
    gradient_checkpointing: str | None = None


def read_launch_settings(world_size: int, environment: Mapping[str, str] = os.environ) -> LaunchSettings:
    """The settings of `accelerate launch`; all empty under any other launcher. Communicates nothing.

    Raises:
        UnsupportedError: a feature that the training script does not have, with the fix.
        ConfigError: a mesh that the ranks do not fill, or more processes asked for than were started.
    """
    _refuse_lost_ranks(environment)
    _refuse_unsupported(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise UnsupportedError(
            f"mixed_precision: {precision} in Accelerate's configuration: only bf16 and no are supported; fp16 scales the "
            "loss, which would enter the importance."
        )
    dtype = None if precision == "no" else precision
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        size = environment.get("PARALLELISM_CONFIG_SP_SIZE", "1")
        together = None if size in ("1", "None") else int(size)
        return LaunchSettings(deepspeed=_deepspeed(environment, precision), precision=dtype, sequence_ranks=together)
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        checkpointing = "non-reentrant" if _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING") else None
        classes = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
        return LaunchSettings(
            sharding=_sharding(environment, world_size),
            offload=_is_on(environment, "FSDP_OFFLOAD_PARAMS"),
            layer_classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
            gradient_checkpointing=checkpointing,
            precision=dtype,
        )
    return LaunchSettings(precision=dtype)


def _refuse_lost_ranks(environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu` starts one process whatever number was asked for, and says nothing."""
    started_alone = "RANK" not in environment and "WORLD_SIZE" not in environment
    if started_alone and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        raise ConfigError(
            "accelerate launch was asked for several processes and started this one alone: with --cpu (or use_cpu, or "
            "distributed_type: MULTI_CPU) it needs MPI for more. Use distributed_type: MULTI_GPU, which starts them on CPUs "
            "too, or torchrun."
        )


def _refuse_unsupported(environment: Mapping[str, str]) -> None:
    for name, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "fsdp_activation_checkpointing_offload"),
    ):
        if _is_on(environment, name):
            raise UnsupportedError(f"{what} in Accelerate's configuration is not supported; turn it off.")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", ""):
        raise UnsupportedError(f"dynamo_backend: {backend} in Accelerate's configuration is not supported; set it to 'no'.")
    for kind in ("TP", "CP", "SP"):
        size = environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
        if size not in ("1", "None") and not (kind == "SP" and _is_on(environment, "ACCELERATE_USE_DEEPSPEED")):
            raise UnsupportedError(
                f"parallelism_config_{kind.lower()}_size: {size} in Accelerate's configuration is not supported: only data "
                "parallelism is (parallelism_config_dp_replicate_size and parallelism_config_dp_shard_size), and with "
                "DeepSpeed sequence parallelism (parallelism_config_sp_size)."
            )


def _deepspeed(environment: Mapping[str, str], precision: str) -> str | dict[str, Any]:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() not in ("none", ""):
        return file
    zero: dict[str, Any] = {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))}
    for name in ("offload_optimizer", "offload_param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", "none")
        if device not in ("none", ""):
            zero[name] = {"device": device}
    settings: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}, "steps_per_print": 10**9}
    for name, variable, kind in (
        ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", int),
        ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING", float),
    ):
        value = environment.get(variable, "auto")
        if value not in ("auto", "none"):
            settings[name] = kind(value)
    return settings


def _sharding(environment: Mapping[str, str], world_size: int) -> str:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise UnsupportedError("FSDP1 in Accelerate's configuration is not supported: set fsdp_version: 2.")
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy != "TRANSFORMER_BASED_WRAP":
        raise UnsupportedError(
            f"fsdp_auto_wrap_policy: {policy} in Accelerate's configuration is not supported: decoder layers are sharded one "
            "by one; set it to TRANSFORMER_BASED_WRAP."
        )
    if environment.get("FSDP_IGNORED_MODULES", "None") != "None":
        raise UnsupportedError("fsdp_ignored_modules in Accelerate's configuration is not supported; remove it.")
    suffix = "" if _is_on(environment, "FSDP_RESHARD_AFTER_FORWARD", "true") else "-no-reshard"
    replicas = int(environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    if not _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG") or replicas == 1:
        return f"fsdp2{suffix}"
    shards = int(environment.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1"))
    if replicas * shards != world_size:
        raise ConfigError(
            f"parallelism_config_dp_replicate_size {replicas} x parallelism_config_dp_shard_size {shards} in Accelerate's "
            f"configuration must be the number of processes, which is {world_size}."
        )
    return f"hsdp{suffix}:{shards}"


def _is_on(environment: Mapping[str, str], name: str, default: str = "false") -> bool:
    return environment.get(name, default).strip().lower() in ("1", "true", "yes")
