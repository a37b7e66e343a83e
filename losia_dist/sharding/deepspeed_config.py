"""DeepSpeed's configuration: read as DeepSpeed reads it, and refused where subnets would not train as they should.

Nothing here touches a device or another rank. `docs/support-matrix.md` lists what was tried, key by key
(`tests/support/deepspeed_keys.py`).
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from losia_dist.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

_REMOVED = "DeepSpeed 0.19 has removed it and takes no configuration with it; remove the key"
_CHECKPOINT = "LoSiA writes and reads the engine's checkpoints itself, so that it would do nothing; remove it"
_MASTERS = "subnets are stepped from fp32 masters (LoSiAAdamW would keep a second copy inside DeepSpeed's); remove it"

# (path, what to do instead): refused unless the value turns the feature off. `_OFF` names further values that do.
_REFUSED: list[tuple[str, str]] = [
    ("fp16.enabled", 'fp16 scales the loss, which would enter the importance; use "bf16": {"enabled": true}'),
    ("torch_autocast.enabled", 'use "bf16": {"enabled": true}'),
    ("bf16.bf16_master_weights_and_grads", _MASTERS),
    ("bf16.bf16_optimizer_states", _MASTERS),
    ("fp16.fp16_master_weights_and_grads", _MASTERS),
    ("gradient_allreduce_op", 'importance is taken from the mean over the ranks; use "mean"'),
    ("zero_optimization.zero_hpz_partition_size", "a second copy of the weights would miss re-localized subnets; remove it"),
    ("zero_optimization.zero_quantized_weights", "subnets cannot be written into quantized weights; remove it"),
    ("zero_optimization.zero_quantized_nontrainable_weights", "subnets cannot be written into them; remove it"),
    ("zero_optimization.zero_quantized_gradients", "not tested with subnets; remove it"),
    ("zero_optimization.offload_optimizer.device", "only offload to the CPU is supported"),
    ("zero_optimization.offload_param.device", "only offload to the CPU is supported"),
    (
        "zero_optimization.offload_optimizer.ratio",
        "the rest is stepped by a second optimizer, whose moments LoSiA cannot clear",
    ),
    ("zero_optimization.offload_optimizer.super_offload", "it steps the optimizer in processes of its own; remove it"),
    ("zero_optimization.zenflow", "ZenFlow steps parameters one by one; remove it"),
    ("zero_optimization.legacy_stage1", "DeepSpeed no longer has it; remove it"),
    ("tensor_parallel.autotp_size", "tensor parallelism cuts the weights; use ZeRO-3 instead"),
    ("data_parallel_size", "with sequence_parallel_size it makes a mesh without Ulysses' groups; leave it out"),
    (
        "expert_parallel.enabled",
        "AutoEP puts modules of its own in the experts' place; remove it, and use ZeRO-3 or Transformers' expert parallelism "
        "(losia_dist.load_distributed_model)",
    ),
    ("hybrid_engine.enabled", "the hybrid engine is not supported"),
    ("compile.deepcompile", "DeepCompile is not tested with subnets; remove it"),
    ("weight_quantization", "subnets cannot be written into quantized weights; remove it"),
    ("data_efficiency.enabled", "curriculum sampling and token dropping are not tested with subnets; remove it"),
    ("autotuning.enabled", "DeepSpeed would measure the model and end the process; remove it"),
    ("checkpoint.load_universal", _CHECKPOINT),
    ("checkpoint.use_node_local_storage", _CHECKPOINT),
    ("checkpoint.parallel_write", _CHECKPOINT),
    ("checkpoint.writer", _CHECKPOINT),
    ("datastates_ckpt", _CHECKPOINT),
]
_OFF: dict[str, tuple[Any, ...]] = {
    "gradient_allreduce_op": ("mean",),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.offload_optimizer.device": ("cpu",),
    "zero_optimization.offload_param.device": ("cpu",),
    "zero_optimization.offload_optimizer.ratio": (1.0,),
    "tensor_parallel.autotp_size": (1,),
}
_REMOVED_KEYS = {
    "": (
        *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention"),
        *("elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
    ),
    "zero_optimization": ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"),
}
# Optimizers of DeepSpeed's file that look at more than one weight at a time: a subnet is a part of a matrix, and ZeRO hands
# over a part of that.
_WHOLE_MATRIX = {
    "muon": "it takes whole matrices, which a subnet is a part of, and builds groups of its own, not one per decoder layer",
    "lamb": "it scales by the norm of a whole layer, of which ZeRO hands it a part",
}

# What DeepSpeed 0.19 reads. It passes over any other key of these without a word; sections that are not here it checks itself.
_KNOWN: dict[str, tuple[str, ...]] = {
    "": (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation"),
        *("gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
        *("communication_data_type", "seq_parallel_communication_data_type", "disable_allgather", "data_types"),
        *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "fp16", "bf16", "bfloat16"),
        *("torch_autocast", "optimizer", "scheduler", "steps_per_print", "dump_state", "disable_python_gc", "log_level"),
        *("wall_clock_breakdown", "memory_breakdown", "timers", "flops_profiler", "comms_logger", "tensorboard", "wandb"),
        *("csv_monitor", "comet", "autotuning", "activation_checkpointing", "pipeline", "hybrid_engine", "compile", "aio"),
        *("tensor_parallel", "sequence_parallel_size", "data_parallel_size", "expert_parallel", "data_efficiency"),
        *("use_data_before_expert_parallelism", "checkpoint", "datastates_ckpt", "dataloader_drop_last", "weight_quantization"),
        *("vocabulary_size", "allgather_size"),
    ),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "checkpoint": (
        *("tag_validation", "checkpoint_serialization", "load_universal", "use_node_local_storage", "parallel_write", "writer"),
    ),
}


def read_deepspeed_config(config: dict[str, Any] | str | Path) -> dict[str, Any]:
    """A copy of the configuration as a dictionary, in one form: "stage" a number, "bf16" by that name, truth values no text.

    A file is read as DeepSpeed reads it: comments and trailing commas are fine, a key given twice is not.

    Raises:
        ConfigError: the file is missing or cannot be read so, or a value that DeepSpeed would not take as it is meant.
    """
    if isinstance(config, dict):
        return _in_one_form(copy.deepcopy(config), "the DeepSpeed configuration")
    try:
        import hjson  # DeepSpeed's own reader, and installed with it
    except ImportError as error:
        raise ConfigError(f"DeepSpeed configuration {config} needs DeepSpeed: pip install 'losia_dist[deepspeed]'.") from error
    try:
        settings = hjson.loads(Path(config).read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except OSError as error:
        raise ConfigError(f"DeepSpeed configuration {config} cannot be read: {error.strerror}. Check --deepspeed.") from error
    except _Twins as error:
        raise ConfigError(f"DeepSpeed configuration {config} gives {error} twice: remove one of the two.") from error
    except (ValueError, RecursionError) as error:  # hjson's own errors, and text that is not UTF-8
        raise ConfigError(f"DeepSpeed configuration {config} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"DeepSpeed configuration {config} must be a JSON object.")
    return _in_one_form(settings, f"DeepSpeed configuration {config}")


def refuse_unsupported(settings: dict[str, Any]) -> None:
    """Look at a configuration in `read_deepspeed_config`'s form; "auto" stands for a value that is filled in later.

    Says in the log which keys nothing reads.

    Raises:
        UnsupportedError: a feature that the support matrix refuses, with the fix.
        ConfigError: a key that DeepSpeed would pass over, and that is one letter or two from a key that it reads.
    """
    for path, instead in _REFUSED:
        value = _at(settings, path)
        if value is not None and value not in (False, 0, "none", "auto", *_OFF.get(path, ())):
            raise UnsupportedError(
                f'"{path}": {value!r} in the DeepSpeed configuration is not supported with LoSiA: {instead}.'
            )
    for section, names in _REMOVED_KEYS.items():
        for name in names:
            if name in (_at(settings, section) or {}):
                raise UnsupportedError(f'"{_join(section, name)}" in the DeepSpeed configuration: {_REMOVED}.')
    kind = _at(settings, "optimizer.type")
    if str(kind).lower() in _WHOLE_MATRIX:
        raise UnsupportedError(
            f'"optimizer.type": {kind!r} in the DeepSpeed configuration is not supported with LoSiA: '
            f'{_WHOLE_MATRIX[str(kind).lower()]}. Use "AdamW", or leave "optimizer" out for LoSiAAdamW.'
        )
    _refuse_rounding(settings)
    _refuse_scaling(settings)
    _note_unread(settings)


def _refuse_rounding(settings: dict[str, Any]) -> None:
    in_bf16 = (_at(settings, "bf16.enabled") or False) is not False  # "auto": not known yet
    for path in ("communication_data_type", "data_types.grad_accum_dtype"):
        kind = str(_at(settings, path)).lower()
        if kind == "fp16" or (kind == "bf16" and not in_bf16):
            why = (
                "fp16 has too small a range without a loss scale"
                if kind == "fp16"
                else "an fp32 model's gradients would be rounded"
            )
            raise UnsupportedError(
                f'"{path}": {kind!r} in the DeepSpeed configuration is not supported with LoSiA: {why}; remove it.'
            )


def _refuse_scaling(settings: dict[str, Any]) -> None:
    """DeepSpeed asserts most of this too, once it has built everything else."""
    zero = settings.get("zero_optimization") or {}
    stage, scatters = zero.get("stage", 0), zero.get("reduce_scatter", True) is not False
    for name, plain in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if settings.get(name, plain) in (plain, "auto"):
            continue
        given = f'"{name}": {settings[name]!r} in the DeepSpeed configuration'
        if stage == 3 and name == "gradient_predivide_factor":
            raise UnsupportedError(f"{given}: ZeRO-3 does not multiply by it again where it equals the ranks; remove it.")
        if stage in (2, 3) and scatters:
            raise UnsupportedError(
                f'{given} does not work with ZeRO-{stage}\'s reduce_scatter: remove it, or set "reduce_scatter": false.'
            )


def _note_unread(settings: dict[str, Any]) -> None:
    for section, known in _KNOWN.items():
        found = _at(settings, section)
        for name in found if isinstance(found, dict) else ():
            if name in known or name in _REMOVED_KEYS.get(section, ()):
                continue
            near = difflib.get_close_matches(str(name), known, 1, cutoff=0.85)
            if near:
                raise ConfigError(
                    f'"{_join(section, name)}" in the DeepSpeed configuration is no key of DeepSpeed, which would pass over '
                    f'it: did you mean "{near[0]}"?'
                )
            _tell_unread(_join(section, name))


@cache  # once a process, however often the settings are looked at
def _tell_unread(path: str) -> None:
    logger.warning('"%s" in the DeepSpeed configuration is read neither by DeepSpeed nor by LoSiA.', path)


def _in_one_form(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Values as DeepSpeed takes them: it reads text as truth values and numbers in some sections, and not in others."""
    for name in ("zero_optimization", "bf16", "bfloat16", "fp16"):
        if name in settings:
            if not isinstance(settings[name], dict):
                example = ' such as {"stage": 2}' if name == "zero_optimization" else ' such as {"enabled": true}'
                raise ConfigError(f'"{name}": {settings[name]!r} in {where}: an object is needed,{example}.')
            settings[name] = _with_truth_values(settings[name])
    for name, value in settings.items():
        if isinstance(value, str) and value.lower() in ("true", "false"):
            raise ConfigError(f'"{name}": {value!r} in {where} is text, which DeepSpeed takes for true: leave out its quotes.')
    if "bfloat16" in settings:
        if "bf16" in settings:
            raise ConfigError(f'{where} has both "bf16" and "bfloat16", its older name: remove one of the two.')
        settings["bf16"] = settings.pop("bfloat16")
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", "auto") != "auto":
        zero["stage"] = _stage(zero["stage"], where)
    return settings


def _stage(value: Any, where: str) -> int:
    try:
        stage = int(value)
        if isinstance(value, bool) or stage != float(value) or not 0 <= stage <= 3:
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f'"stage": {value!r} in {where}: ZeRO has the stages 0, 1, 2 and 3.') from None
    return stage


def _with_truth_values(section: dict[str, Any]) -> dict[str, Any]:
    truth = {"true": True, "false": False}
    return {
        name: _with_truth_values(value)
        if isinstance(value, dict)
        else truth.get(value.lower(), value)
        if isinstance(value, str)
        else value
        for name, value in section.items()
    }


class _Twins(ValueError):
    """Keys that an object has more than once."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twins = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twins:
        raise _Twins(", ".join(f'"{name}"' for name in twins))
    return dict(pairs)


def _at(settings: Any, path: str) -> Any:
    """The value at a dotted path, or None; the whole for an empty path."""
    for part in path.split(".") if path else ():
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _join(section: str, name: Any) -> str:
    return f"{section}.{name}" if section else str(name)
