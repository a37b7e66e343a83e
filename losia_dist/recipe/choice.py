"""Which engine a run uses, from the options, the DeepSpeed file and `accelerate launch`; contradictions are refused."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from losia_dist.errors import ConfigError
from losia_dist.recipe.environment import Process
from losia_dist.recipe.fsdp import Sharding


@dataclass(frozen=True)
class EngineChoice:
    """deepspeed: complete settings, or None. sharding: FSDP2's, or None; both None: one process or DDP.

    offload, layer_classes: of FSDP2. precision: "bf16" or "fp32". checkpointing: one of `options.CHECKPOINTING`.
    sequence_ranks: neighbouring ranks that compute each sequence together.
    """

    deepspeed: dict[str, Any] | None
    sharding: Sharding | None
    offload: bool
    layer_classes: tuple[str, ...]
    precision: str
    checkpointing: str
    sequence_ranks: int = 1

    @property
    def cuts_weights(self) -> bool:
        """Each rank keeps a part of every weight: FSDP2, HSDP, ZeRO-3."""
        return self.sharding is not None or self.is_zero3

    @property
    def is_zero3(self) -> bool:
        """DeepSpeed at stage 3."""
        return self.deepspeed is not None and self.deepspeed.get("zero_optimization", {}).get("stage") == 3


def choose_engine(options: argparse.Namespace, process: Process) -> EngineChoice:
    """Put the three sources together. Each rank by itself; communicates nothing.

    Raises:
        ConfigError: two sources contradict each other, or a setting cannot work with this number of ranks.
        UnsupportedError: an engine's feature that is not supported.
    """
    from losia_dist.integrations.accelerate.launch_settings import read_launch_settings

    launch = read_launch_settings(process.world_size)
    precision = _agree("--precision", options.precision, "mixed_precision", launch.precision)
    kind = options.gradient_checkpointing
    checkpointing = _agree("--gradient_checkpointing", kind, "fsdp_activation_checkpointing", launch.gradient_checkpointing)
    if launch.deepspeed is not None and (options.deepspeed or options.sharding):
        given = "--deepspeed" if options.deepspeed else "--sharding"
        raise ConfigError(
            f"accelerate launch is configured for DeepSpeed, and {given} was given too: leave out one of the two."
        )
    if launch.sharding is not None and options.deepspeed:
        raise ConfigError("accelerate launch is configured for FSDP, and --deepspeed was given too: leave out one of the two.")
    text = _agree("--sharding", options.sharding, "the sharding of accelerate launch", launch.sharding)
    sharding = Sharding.parse(text) if text else None
    if sharding is not None:
        sharding.check(process.world_size)
    source = options.deepspeed or launch.deepspeed
    asked = options.sequence_parallel if options.sequence_parallel > 1 else None
    together = _agree("--sequence_parallel", asked, "parallelism_config_sp_size", launch.sequence_ranks) or 1
    if together > 1 and (source is None or process.world_size % together):
        raise ConfigError(
            f"--sequence_parallel {together}: each sequence is computed by that many of the {process.world_size} ranks, under "
            "DeepSpeed. Give --deepspeed, and a divisor of the number of ranks."
        )
    if options.tiled_mlp > 1 and source is None and process.world_size > 1:
        raise ConfigError(
            f"--tiled_mlp {options.tiled_mlp}: DDP and FSDP2 would reduce the gradient of an MLP's subnet once a tile, and "
            "DeepSpeed alone waits for the last. Give --deepspeed, or leave --tiled_mlp out."
        )
    settings = None if source is None else _deepspeed_settings(source, options, process, precision, together)
    if precision is None:
        in_bf16 = process.device.type == "cuda" if settings is None else settings["bf16"]["enabled"]
        precision = "bf16" if in_bf16 else "fp32"
    return EngineChoice(
        deepspeed=settings,
        sharding=sharding,
        offload=options.offload or launch.offload,
        layer_classes=tuple(options.shard_layers or launch.layer_classes),
        precision=precision,
        checkpointing=checkpointing or "off",
        sequence_ranks=together,
    )


def _agree(option: str, given: Any, setting: str, launched: Any) -> Any:
    """The one value that was given, or both if they are equal."""
    if given is not None and launched is not None and given != launched:
        raise ConfigError(
            f"{option} {given} contradicts {setting} ({launched}) of accelerate launch: leave out one, or make them equal."
        )
    return launched if given is None else given


def _deepspeed_settings(
    source: str | dict[str, Any], options: argparse.Namespace, process: Process, precision: str | None, together: int
) -> dict[str, Any]:
    """DeepSpeed's configuration with the options filled in; an entry that contradicts an option is refused."""
    from losia_dist.sharding.deepspeed_config import read_deepspeed_config, refuse_unsupported

    where = source if isinstance(source, str) else "accelerate launch's configuration"
    settings = _without_auto(read_deepspeed_config(source))
    if options.losia:
        refuse_unsupported(settings)
    for name in ("fp16", "amp"):
        if settings.get(name, {}).get("enabled"):
            raise ConfigError(f'"{name}" in {where}: training is in bf16 or fp32; use "bf16": {{"enabled": true}}.')
    if "scheduler" in settings:
        raise ConfigError(
            f'"scheduler" in {where}: the schedule is set by --warmup_ratio and --min_lr_ratio; remove it from the file.'
        )
    data_ranks = process.world_size // together
    whole = options.micro_batch * options.gradient_accumulation * data_ranks
    for name, option, value in (
        ("train_micro_batch_size_per_gpu", "--micro_batch", options.micro_batch),
        ("gradient_accumulation_steps", "--gradient_accumulation", options.gradient_accumulation),
        ("train_batch_size", f"--micro_batch x --gradient_accumulation x {data_ranks} ranks =", whole),
        ("gradient_clipping", "--max_grad_norm", options.max_grad_norm),
    ):
        _fill(settings, name, option, value, where)
    if together > 1 or "sequence_parallel_size" in settings:
        _fill(settings, "sequence_parallel_size", "--sequence_parallel", together, where)
    if "optimizer" in settings:
        parameters = settings["optimizer"].setdefault("params", {})
        if options.learning_rate is not None:
            _fill(parameters, "lr", "--learning_rate", options.learning_rate, where)
        _fill(parameters, "weight_decay", "--weight_decay", options.weight_decay, where)
    bf16 = settings.setdefault("bf16", {})
    bf16["enabled"] = bool(bf16.get("enabled", False)) if precision is None else precision == "bf16"
    return settings


def _fill(settings: dict[str, Any], name: str, option: str, value: Any, where: str) -> None:
    if settings.get(name, value) != value:
        raise ConfigError(
            f'"{name}": {settings[name]} in {where} contradicts {option} {value}: remove it there, or make the two equal.'
        )
    settings[name] = value


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Without entries that are "auto": Transformers' word for what a script fills in, which DeepSpeed does not know."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value for name, value in settings.items() if value != "auto"
    }
