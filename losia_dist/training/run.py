"""One training run from its options: data, model, engine, loop, summary."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_cosine_with_min_lr_schedule_with_warmup

from losia_dist.checkpoint.export import export_model, save_whole_model
from losia_dist.conductor import LoSiA
from losia_dist.config import LoSiAConfig
from losia_dist.data import build_dataset, load_records, make_evaluation_loader, make_loader, train_validation_split
from losia_dist.data import prepare_for_packing as prepare_packing
from losia_dist.errors import ConfigError
from losia_dist.guard import check_same_on_all_ranks
from losia_dist.model import get_losia_model
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.subnet.groups import losia_parameter_groups
from losia_dist.training.engines import DeepSpeedRun, PlainRun
from losia_dist.training.environment import Place, end_process_group, find_place, start_process_group
from losia_dist.training.heldout import held_out_loss, sample_answers
from losia_dist.training.logs import RunLog
from losia_dist.training.options import check


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Run training as the options say; returns the summary that rank 0 also writes to summary.json. On every rank.

    Raises:
        LoSiAError: for every bad input, before ranks speak to each other wherever each of them can see it alone.
    """
    config = check(options)
    settings = _deepspeed_settings(options)
    precision = _precision(options, settings)
    place = find_place()
    tokenizer, datasets = _load_data(options)
    torch.manual_seed(options.seed)
    model = _load_model(options, precision)
    use_cache = model.config.use_cache
    flatten = prepare_packing(model) if options.packing else True
    start_process_group(place)
    if dist.is_initialized():
        check_same_on_all_ranks("the options", _comparable(options), dist.group.WORLD)
        check_same_on_all_ranks("the LoSiA configuration", config.to_dict() if config else {}, dist.group.WORLD)
    where: dict[str, Any] = {"rank": place.rank, "world_size": place.world_size, "flatten": flatten}
    loader = make_loader(datasets["train"], tokenizer, options.micro_batch, seed=options.seed, **where)
    held_out = datasets.get("eval")
    eval_loader = make_evaluation_loader(held_out, tokenizer, options.micro_batch, **where) if held_out else None
    steps = options.max_steps or max(1, math.ceil(len(loader) * options.epochs / options.gradient_accumulation))
    if config is not None:
        model = get_losia_model(model, config)
    run = _start(model, config, settings, options, place, steps)
    summary = _loop(run, options, place, steps, loader, eval_loader, held_out, tokenizer)
    run.model.config.use_cache = run.model.config.get_text_config().use_cache = use_cache  # packing turned it off
    if not options.no_save:
        target = Path(options.output_dir) / "model"
        if run.losia is not None:
            export_model(run.losia, target)
        else:
            save_whole_model(run.model, target)
        if place.rank == 0:
            tokenizer.save_pretrained(target)
    end_process_group()
    return summary


def _load_data(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        model_config = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {options.model}: no model and tokenizer could be read: {error}") from error
    records = load_records(options.train_file, form=options.form)
    held_out = load_records(options.eval_file, form=options.form) if options.eval_file else None
    if held_out is None and options.validation_size:
        records, held_out = train_validation_split(records, options.validation_size, options.seed)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    common = {"context_length": context, "overlong": options.overlong, "packing": options.packing}
    datasets = {"train": build_dataset(records, tokenizer, options.max_length, **common)}
    if held_out is not None:
        datasets["eval"] = build_dataset(held_out, tokenizer, options.max_length, **common)
    return tokenizer, datasets


def _load_model(options: argparse.Namespace, precision: str) -> Any:
    extra = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        trust_remote_code=options.trust_remote_code,
        **extra,
    )
    if options.gradient_checkpointing != "off":
        reentrant = options.gradient_checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant and not options.losia:
            model.enable_input_require_grads()
    return model


def _start(
    model: Any,
    config: LoSiAConfig | None,
    settings: dict[str, Any] | None,
    options: argparse.Namespace,
    place: Place,
    steps: int,
) -> Any:
    """The engine that the options ask for, around the model."""
    rate, decay = options.learning_rate, options.weight_decay

    def schedule(optimizer: Any) -> Any:
        warmup = round(options.warmup_ratio * steps)
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, max(steps, warmup + 1), min_lr_rate=options.min_lr_ratio
        )

    def make_optimizer(wrapped: nn.Module) -> LoSiAAdamW:
        if config is not None:
            groups: Any = losia_parameter_groups(wrapped, lr=rate, weight_decay=decay)
        else:
            groups = [p for p in wrapped.parameters() if p.requires_grad]
        return LoSiAAdamW(groups, lr=rate, weight_decay=decay)

    if settings is not None:
        from losia_dist.integrations import deepspeed as integration

        if config is not None:
            engine, *_ = integration.initialize(
                model=model,
                losia_config=config,
                config=settings,
                optimizer=None if "optimizer" in settings else make_optimizer(model),
                lr=rate,
                lr_scheduler=schedule,
            )
            return DeepSpeedRun(engine, engine.losia)
        engine, *_ = integration.initialize_dense(model, settings, make_optimizer(model), schedule)
        return DeepSpeedRun(engine, None)
    wrapped = model.to(place.device)
    if place.world_size > 1:
        devices = [place.device.index] if place.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=devices, broadcast_buffers=False)
    optimizer = make_optimizer(wrapped)
    losia = LoSiA(wrapped, optimizer, config) if config is not None else None
    return PlainRun(
        wrapped,
        optimizer,
        schedule(optimizer),
        losia,
        accumulation=options.gradient_accumulation,
        max_grad_norm=options.max_grad_norm,
        device=place.device,
    )


def _loop(
    run: Any,
    options: argparse.Namespace,
    place: Place,
    steps: int,
    loader: DataLoader[dict[str, Tensor]],
    eval_loader: Any,
    held_out: Any,
    tokenizer: Any,
) -> dict[str, Any]:
    log = RunLog(Path(options.output_dir), steps, enabled=place.rank == 0)
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in run.model.parameters() if p.requires_grad)
    summary: dict[str, Any] = {
        "method": "losia" if run.losia is not None else "full",
        "engine": type(run).__name__.removesuffix("Run").lower(),
        "ranks": place.world_size,
        "steps": steps,
        "trainable_parameters": trainable,
        "data": str(loader.dataset.report()),  # type: ignore[attr-defined]
    }
    log.say(f"{summary['method']}: {trainable:,} trainable parameters, {steps} steps; {summary['data']}")
    if eval_loader is not None:
        summary["held_out_loss_before"] = held_out_loss(run, eval_loader)
        log.record(0, held_out=summary["held_out_loss_before"])
        log.say(f"held-out loss before training: {summary['held_out_loss_before']:.4f}")
    samples = options.samples if held_out is not None and not options.packing else 0
    summary["samples_before"] = sample_answers(run, held_out, tokenizer, samples, options.sample_tokens)

    batches = _endless(loader)
    seconds, tokens, logged = 0.0, 0, 0
    loss_sum = torch.zeros((), device=run.device)
    for step in range(1, steps + 1):
        began = time.perf_counter()
        micro_batches = [
            {name: tensor.to(run.device) for name, tensor in batch.items()}
            for batch in itertools.islice(batches, options.gradient_accumulation)
        ]
        localizing = run.losia.localizing if run.losia is not None else None
        loss_sum += run.train_step(micro_batches)
        tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * place.world_size
        seconds += time.perf_counter() - began
        if step % options.logging_steps == 0 or step == steps:
            # The only point where the host waits for the device.
            mean = loss_sum / (step - logged)
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= place.world_size
            values: dict[str, Any] = {"loss": mean.item(), "lr": _rate(run), "tokens_per_second": tokens / seconds}
            if run.grad_norm is not None:
                values["grad_norm"] = float(run.grad_norm)
            if localizing is not None:
                values["localizing"] = localizing[0] if len(localizing) == 1 else f"{localizing[0]} .. {localizing[-1]}"
            log.advance(step, **values)
            summary["train_loss"] = values["loss"]
            loss_sum.zero_()
            logged = step
        else:
            log.advance(step)
        if eval_loader is not None and options.eval_steps and step % options.eval_steps == 0 and step < steps:
            log.record(step, held_out=held_out_loss(run, eval_loader))

    summary |= {"training_seconds": round(seconds, 2), "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}
    if eval_loader is not None:
        summary["held_out_loss_after"] = held_out_loss(run, eval_loader)
        log.record(steps, held_out=summary["held_out_loss_after"])
        log.say(
            f"held-out loss: {summary['held_out_loss_before']:.4f} before training, {summary['held_out_loss_after']:.4f} after"
        )
    summary["samples_after"] = sample_answers(run, held_out, tokenizer, samples, options.sample_tokens)
    for before, after in zip(summary["samples_before"], summary["samples_after"], strict=True):
        log.say(f"\nprompt: {before['prompt']}\n\nbefore: {before['answer']}\n\nafter: {after['answer']}\n")
    log.finish(summary)
    return summary


def _rate(run: Any) -> float:
    """The scheduled learning rate (rewarming of single groups not included)."""
    optimizer = run.engine.optimizer if isinstance(run, DeepSpeedRun) else run.optimizer
    return float(optimizer.param_groups[0]["lr"])


def _endless(loader: Any) -> Iterator[dict[str, Tensor]]:
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def _deepspeed_settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """DeepSpeed's configuration with the options filled in; an entry that contradicts an option is refused."""
    if options.deepspeed is None:
        return None
    from losia_dist.integrations.deepspeed import read_deepspeed_config, refuse_unsupported

    settings = read_deepspeed_config(options.deepspeed)
    if options.losia:
        refuse_unsupported(settings)
    for name, option, value in (
        ("train_micro_batch_size_per_gpu", "micro_batch", options.micro_batch),
        ("gradient_accumulation_steps", "gradient_accumulation", options.gradient_accumulation),
        ("gradient_clipping", "max_grad_norm", options.max_grad_norm),
    ):
        if settings.get(name, "auto") not in ("auto", value):
            raise ConfigError(
                f'"{name}": {settings[name]} in {options.deepspeed} contradicts --{option} {value}: remove it from the file, '
                "or make the two equal."
            )
        settings[name] = value
    if options.precision is not None:
        settings["bf16"] = {**settings.get("bf16", {}), "enabled": options.precision == "bf16"}
    return settings


def _precision(options: argparse.Namespace, settings: dict[str, Any] | None) -> str:
    if options.precision is not None:
        return str(options.precision)
    if settings is not None:
        return "bf16" if settings.get("bf16", {}).get("enabled") else "fp32"
    return "bf16" if torch.cuda.is_available() else "fp32"


def _comparable(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "local_rank" and not callable(value)}
