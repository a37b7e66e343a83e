"""What `LoSiATrainerMixin` refuses, with the fix: settings before anything is prepared, engines once Accelerate chose one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.sharding.deepspeed_config import read_deepspeed_config, refuse_unsupported
from losia_dist.subnet.convert import find_sites

ADAMW = ("adamw_torch", "adamw_torch_fused")  # values of TrainingArguments.optim that stand for LoSiAAdamW

# (field of the training arguments, what to do instead): refused when the field is set.
_REFUSED_ARGUMENTS = [
    ("fp16", "the loss scale would enter the importance; use bf16=True, or fp32"),
    ("torch_compile", "compiled models are not tested with subnets; remove it"),
    ("auto_find_batch_size", "a retry would start from subnets that have already moved; set per_device_train_batch_size"),
    ("save_on_each_node", "rank 0 writes the model; give all nodes a shared output_dir"),
    ("optim_args", "LoSiAAdamW takes none; use adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    ("sync_ref_model", "TRL would mix frozen weights that lack their subnets' values into the reference; remove it"),
]


def refuse_arguments(trainer: type, arguments: dict[str, Any], losia_config: Any) -> None:
    """Look at what a trainer was called with, before it does anything. No communication.

    `arguments`: the trainer's own, by name (model, args, optimizers, ref_model, peft_config ...).

    Raises:
        ConfigError: a value that cannot work, named with the fix.
        UnsupportedError: a combination that the support matrix refuses.
    """
    if not isinstance(losia_config, LoSiAConfig):
        raise ConfigError(f"losia_config={losia_config!r}: a LoSiAConfig is needed, such as LoSiAConfig(rank_factor=0.125).")
    _refuse_model(arguments, losia_config, uses_trl=any(c.__module__.split(".")[0] == "trl" for c in trainer.__mro__))
    args: Any = arguments.get("args")
    file = getattr(args, "deepspeed", None)
    if isinstance(file, str) and Path(file).is_file():
        read_deepspeed_config(file)  # a key given twice, of which Transformers takes the last
    _settle_deepspeed(getattr(args, "deepspeed_plugin", None))
    for name, instead in _REFUSED_ARGUMENTS:
        if getattr(args, name, None):
            raise UnsupportedError(f"{name}={getattr(args, name)!r} is not supported with LoSiA: {instead}.")
    _refuse_hub_strategy(args)
    if getattr(args, "fsdp", None):
        _refuse_fsdp1(int((args.fsdp_config or {}).get("version", 2)))
    if arguments.get("optimizer_cls_and_kwargs") is not None:
        raise UnsupportedError("optimizer_cls_and_kwargs is not supported with LoSiA: pass optimizers=(optimizer, None).")
    optimizer = (arguments.get("optimizers") or (None,))[0]
    optim = str(getattr(args, "optim", None) or ADAMW[0])
    optim = optim.rsplit(".", 1)[-1].lower()  # an enum or its value
    if optimizer is None and optim not in ADAMW:
        raise UnsupportedError(
            f"optim={optim!r} is not supported with LoSiA, whose optimizer needs one group per decoder layer: use "
            "optim='adamw_torch' (LoSiAAdamW), or pass optimizers=(optimizer, None) built from losia_parameter_groups(model)."
        )


def _settle_deepspeed(plugin: Any) -> dict[str, Any]:
    """Bring the settings of Accelerate's plugin into one form, in place: Accelerate, Transformers and TRL compare "stage" with
    numbers, while DeepSpeed takes "3" too. Returns them."""
    if plugin is None:
        return {}
    holder = plugin.hf_ds_config
    settings = read_deepspeed_config(holder.config)
    holder.config.clear()
    holder.config.update(settings)
    holder.set_stage_and_offload()
    plugin.zero_stage = settings.get("zero_optimization", {}).get("stage", plugin.zero_stage)
    return settings


def _refuse_hub_strategy(args: Any) -> None:
    strategy = getattr(args, "hub_strategy", None)
    strategy = str(getattr(strategy, "value", strategy))
    if getattr(args, "push_to_hub", False) and strategy in ("checkpoint", "all_checkpoints"):
        raise UnsupportedError(
            f"hub_strategy={strategy!r} would upload checkpoints that cannot be resumed from: LoSiA's state lies beside them. "
            "Use hub_strategy='every_save' or 'end', which upload the model."
        )


def _refuse_model(arguments: dict[str, Any], losia_config: LoSiAConfig, uses_trl: bool) -> None:
    model = arguments.get("model")
    if arguments.get("model_init") is not None:
        raise UnsupportedError("model_init is not supported with LoSiA: pass model=... (no hyperparameter search).")
    has_adapters = getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False)
    if has_adapters or arguments.get("peft_config") is not None:
        raise UnsupportedError(
            "a PEFT adapter and LoSiA cannot train one model together: pass the base model (model.merge_and_unload() keeps "
            "what an adapter has learned), and no peft_config."
        )
    if arguments.get("quantization_config") is not None:
        raise UnsupportedError(
            "quantization_config is for a model that the trainer loads with an adapter: load the model with it yourself "
            "(from_pretrained(..., quantization_config=...)), and pass the model."
        )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise UnsupportedError(
            "the model was sharded while loading (distributed_config), which a Trainer does not resume: load it without, and "
            "use fsdp=True (FSDP2) or DeepSpeed; or write a loop of your own around losia_dist.load_distributed_model."
        )
    _refuse_reference(arguments)
    if uses_trl and losia_config.output_rank_factor is not None:
        raise UnsupportedError(
            f"output_rank_factor={losia_config.output_rank_factor} does not work in TRL's trainers: they compute the loss from "
            "the output layer's frozen weight without calling the layer, so its subnet would never train. Set "
            "output_rank_factor=None, or use LoSiATrainer."
        )


def _refuse_reference(arguments: dict[str, Any]) -> None:
    """DPO's reference must be the model as it is before training; TRL loads one from the model's own path if none is passed."""
    model, reference, args = arguments.get("model"), arguments.get("ref_model"), arguments.get("args")
    if isinstance(reference, nn.Module) and find_sites(reference):
        raise ConfigError("ref_model has subnets: the reference is the base model; load it again, or leave ref_model out.")
    converted = isinstance(model, nn.Module) and bool(find_sites(model))
    if "ref_model" in arguments and reference is None and converted and not getattr(args, "precompute_ref_log_probs", False):
        raise ConfigError(
            "the model has subnets already and no ref_model was passed: TRL would load the reference from the model's path, "
            "which is not the model in memory if that was trained. Pass an unconverted model, or ref_model, or set "
            "precompute_ref_log_probs=True."
        )


def refuse_engine(trainer: Any) -> None:
    """Look at the engine that Accelerate has chosen, before the model is converted. Same on every rank; no communication.

    Raises:
        UnsupportedError: an engine, or one of its features, that the support matrix refuses.
    """
    accelerator, args = trainer.accelerator, trainer.args
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UnsupportedError(
            f"mixed precision {accelerator.mixed_precision!r} is not supported with LoSiA: use bf16, or fp32."
        )
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"{args.n_gpu} GPUs in one process would run torch.nn.DataParallel, which copies the subnets: start with torchrun, "
            "accelerate launch or deepspeed, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )
    if trainer.is_model_parallel:
        raise UnsupportedError("the model is spread over devices (device_map): load it without, and use FSDP2 or ZeRO-3.")
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    if dynamo is not None and str(getattr(dynamo.backend, "value", dynamo.backend)).lower() != "no":
        raise UnsupportedError("torch.compile (dynamo_backend) is not tested with subnets: remove it.")
    _refuse_parallelism(getattr(accelerator, "parallelism_config", None))
    _refuse_fsdp(trainer)
    if trainer.is_deepspeed_enabled:
        refuse_unsupported(_settle_deepspeed(accelerator.state.deepspeed_plugin))
        if trainer.optimizer is not None:
            raise UnsupportedError(
                'optimizers=(optimizer, ...) is not used by the Trainer under DeepSpeed: name the optimizer as "optimizer" in '
                "the DeepSpeed configuration, or leave both out for LoSiAAdamW."
            )


def _refuse_parallelism(parallelism: Any) -> None:
    for name in ("tp_size", "cp_size"):
        size = getattr(parallelism, name, 1) or 1
        if size > 1:
            raise UnsupportedError(
                f"parallelism_config {name}={size} is not supported with LoSiA: use FSDP2 or ZeRO-3 alone, and for long "
                "sequences sp_size under DeepSpeed."
            )


def _refuse_fsdp(trainer: Any) -> None:
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if trainer.args.fsdp and (plugin is None or accelerator.distributed_type.value != "FSDP"):
        raise UnsupportedError(
            f"fsdp was asked for, but Accelerate gave {accelerator.distributed_type.value} on {accelerator.num_processes} "
            "processes: it drops FSDP on a CPU without a word. Start several ranks on GPUs, or take fsdp out."
        )
    if plugin is None:
        return
    _refuse_fsdp1(plugin.fsdp_version)
    if plugin.cpu_ram_efficient_loading:
        raise UnsupportedError(
            "cpu_ram_efficient_loading leaves the weights of all ranks but the first empty while subnets are made from them: "
            "set it to false in the FSDP configuration."
        )
    if plugin.activation_checkpointing:
        raise UnsupportedError(
            "activation_checkpointing in the FSDP configuration wraps the layers under other names: use the training argument "
            "gradient_checkpointing=True instead."
        )


def _refuse_fsdp1(version: int) -> None:
    if version != 2:
        raise UnsupportedError(
            f"FSDP{version} is not supported with LoSiA (flat parameters need one dtype): set fsdp_config={{'version': 2}}, or "
            "fsdp_version: 2 in Accelerate's configuration."
        )
