"""One LoSiA training run on any engine, and the same run on the dense reference. Functions here run on ranks of the pool."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from losia_dist import Located, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.export.live import _gather
from tests.reference.dense import DenseLoSiA, DenseWithOptimizer
from tests.reference.float8 import compute_in_float8
from tests.support.expected import converted_targets, mixture_targets
from tests.support.families import MIXTURES, decoder_layers, tiny_model
from tests.support.models import batches, tiny_llama
from tests.support.quantized import dequantized, quantize

RATE, VOCABULARY, QUIET = 1e-3, 96, 96


@dataclass(frozen=True)
class Run:
    """What is trained, and on what. The global batch of a micro-batch step is `batch` sequences over all ranks."""

    steps: int = 40
    batch: int = 4
    length: int = 12
    accumulation: int = 1
    max_grad_norm: float = 0.0
    checkpointing: str = "off"
    dtype: str = "fp32"  # "mixed": fp32 parameters, computed in bf16 by FSDP2's MixedPrecisionPolicy
    family: str = "llama"  # of tests.support.families; "llama" is tests.support.models.tiny_llama
    model: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=lambda: {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 5})
    deepspeed: dict[str, Any] = field(default_factory=dict)
    optimizer: str = ""  # of torch.optim; none: LoSiAAdamW, whose arithmetic the reference has
    quiet: tuple[tuple[int, int], ...] = ()  # (step, micro-batch) whose loss, and so all gradients, are exactly zero
    silenced: str | None = None  # a weight that starts at zero
    quantized: str = ""  # the form of tests.support.quantized that the decoder's layers have; the reference has their values
    calibration: int = 0  # micro-batches over all ranks that start="importance" locates the first subnets from


def rate_at(step: int, steps: int) -> float:
    """Linear warmup over a tenth of the steps, then linear decay; nothing that any scheduler class adds to."""
    warmup = steps // 10
    return RATE * ((step + 1) / warmup if step < warmup else 1.0 - 0.9 * (step - warmup) / (steps - warmup))


def global_batches(run: Run) -> list[list[dict[str, torch.Tensor]]]:
    found = batches(
        steps=run.steps,
        micro_batches=run.accumulation,
        batch=run.batch,
        length=run.length,
        vocab=VOCABULARY,
        seed=7,
    )
    for step, micro_batch in run.quiet:
        found[step][micro_batch]["labels"] = torch.full_like(found[step][micro_batch]["labels"], QUIET)
    return found


def calibration_batches(run: Run) -> list[dict[str, torch.Tensor]]:
    """Micro-batches; rank i of N takes every N-th of them, beginning with the i-th."""
    found = batches(steps=run.calibration, micro_batches=1, batch=2, length=run.length, vocab=VOCABULARY, seed=11)
    return [step[0] for step in found]


def locate_first(losia: LoSiA, run: Run) -> None:
    """Show this rank's share of the run's calibration batches to the conductor, if there are any."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if run.calibration:
        losia.locate(calibration_batches(run)[rank::world], lambda model, batch: model(**batch, use_cache=False).loss)


def optimizer_of(run: Run) -> Any:
    return getattr(torch.optim, run.optimizer) if run.optimizer else LoSiAAdamW


def build(run: Run) -> torch.nn.Module:
    model = tiny_llama(**run.model) if run.family == "llama" else tiny_model(run.family, **run.model)
    if run.silenced:
        model.get_parameter(run.silenced).data.zero_()
    if run.quiet:
        _let_quiet_labels_weigh_nothing(model)
    return quantize(model, run.quantized) if run.quantized else model


def build_plain(run: Run) -> torch.nn.Module:
    """The same model with ordinary weights."""
    return dequantized(build(run)) if run.quantized else build(run)


def _let_quiet_labels_weigh_nothing(model: torch.nn.Module) -> None:
    forward = model.forward

    def weighed(*args: Any, labels: torch.Tensor, **kwargs: Any) -> Any:
        output = forward(*args, labels=labels, **kwargs)
        output["loss"] = output["loss"] * (labels != QUIET).any()
        return output

    model.forward = weighed


def prepared_model(run: Run) -> torch.nn.Module:
    model = build(run)
    if run.checkpointing != "off":
        kind = {"use_reentrant": run.checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    return model.train()


def dense_settings(run: Run, config: LoSiAConfig, targets: Any, owners: int) -> dict[str, Any]:
    """What the dense reference is told of a run. owners: ranks, or groups of them, that localize by themselves."""
    located = config.located or Located()
    return {
        "period": config.period,
        "layers_per_slot": config.layers_per_slot,
        "importance": located.importance,
        "importance_betas": located.betas,
        "importance_steps": located.importance_steps,
        "lr_schedule": lambda step: rate_at(step, run.steps),
        "rewarm_steps": config.rewarm_steps,
        "reset_bias_correction": config.reset_bias_correction,
        "max_grad_norm": run.max_grad_norm or None,
        "trainable_names": targets.trained,
        "localization_ranks": owners if config.by_rank else None,
        "selection": "random" if config.located is None else "greedy",
        "seed": config.seed,
        "outlier_limit": config.outlier_limit,
        "share_columns": config.share_columns,
        "full_lr_scale": config.full_lr_scale,
        "experts": targets.experts,
        "transposed": targets.transposed,
        "rate_scales": targets.rate_scales,
    }


def reference(run: Run, ranks: int = 1, split: int = 1) -> dict[str, Any]:
    """The dense reference's losses, whole weights and selections. `ranks` matters to reduction="by_rank" alone.

    split: into as many equal parts each micro-batch is cut, for a loss that is no mean over its sequences.
    """
    config = LoSiAConfig(**run.config)
    is_mixture = run.family in MIXTURES and config.target_modules == "all-linear"
    plain = replace(config, retired=None, weight_products=None)  # of the model that the reference has
    targets = mixture_targets(build_plain(run), run.config) if is_mixture else converted_targets(build_plain(run), plain)
    model = build_plain(run)
    if config.weight_products:
        linear = [name for name in targets.subnets if name not in targets.experts and name != "lm_head.weight"]
        compute_in_float8(model, linear, targets.transposed)
    kind = DenseLoSiA if not run.optimizer else partial(DenseWithOptimizer, optimizer_of(run))
    dense = kind(
        model,
        list(targets.groups.values()),
        targets.subnets,
        **dense_settings(run, config, targets, ranks),
    )
    if run.calibration:
        dense.locate(calibration_batches(run))
    first = dict(dense.subnets)
    losses = [
        dense.step([{k: v.chunk(split)[i] for k, v in batch.items()} for batch in micro_batches for i in range(split)])
        for micro_batches in global_batches(run)
    ]
    weights = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    result = {"losses": losses, "weights": weights, "history": dense.history, "first": first}
    return {**result, "groups": list(targets.groups), "experts": targets.experts, "reached": dense.reached}


def weight_key(site: Any) -> str:
    """What the reference calls a site: its weight's name, or for experts the site's own (of a part: with its experts)."""
    return str(site.name) if getattr(site, "experts", None) is not None else f"{site.name}.weight"


def train(engine: str, run: Run, inspect: Any = None, prepare: Any = None) -> dict[str, Any]:
    """Train on an engine of tests.support.matrix; called on every rank. Same keys as `reference` on every rank.

    `inspect(stage, losia, engine)`, if given, is called "before" and "after" every optimizer step; `prepare(model)` once,
    on the plain model.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model, config = prepared_model(run), LoSiAConfig(**run.config)
    if prepare:
        prepare(model)
    loop = _deepspeed_loop if engine.startswith("zero") else _plain_loop
    losia, stepper, close = loop(engine, model, config, run)
    locate_first(losia, run)
    first = {weight_key(layer): (layer.row_index.clone(), layer.col_index.clone()) for layer in losia.sites}
    losses, history = [], []
    for step, micro_batches in enumerate(global_batches(run)):
        mine = [{name: t.chunk(world)[rank] for name, t in batch.items()} for batch in micro_batches]
        localizing = losia.localizing
        for group in stepper.groups:
            group["lr"] = rate_at(step, run.steps)
        losses.append(stepper(mine, inspect))
        if (step + 1) % config.period == 0:
            for name in localizing:
                chosen = {
                    weight_key(layer): (layer.row_index.clone(), layer.col_index.clone())
                    for layer in losia.sites
                    if layer.group_name == name
                }
                history.append((step, name, chosen))
    total = torch.tensor(losses)
    if world > 1:
        dist.all_reduce(total)
        total /= world
    losia.consolidate()
    plain = unwrap(losia.model)
    weights = {n: losia.parameters.read_whole(p).float() for n, p in plain.named_parameters(remove_duplicate=False)}
    weights = {n: w for n, w in weights.items() if not re.search(r"[._]subnet(_\d+)?$", n)}
    assert _gather(plain, losia.parameters).keys() >= weights.keys()
    subnets = {layer.name: losia.parameters.read_whole(layer.subnet).float() for layer in losia.sites}
    result = {"losses": total.tolist(), "weights": weights, "history": history, "subnets": subnets, "first": first}
    close()
    return result


def _plain_loop(engine: str, model: torch.nn.Module, config: LoSiAConfig, run: Run):
    get_losia_model(model, config)
    if run.dtype == "bf16":
        model.to(torch.bfloat16)
    wrapped = _wrap(engine, model, run.dtype)
    optimizer = optimizer_of(run)(losia_parameter_groups(wrapped, lr=RATE), lr=RATE)
    losia = LoSiA(wrapped, optimizer, config)

    def step(micro_batches, inspect):
        total = 0.0
        for batch in micro_batches:
            loss = wrapped(**batch, use_cache=False).loss
            (loss / len(micro_batches)).backward()
            total += loss.item() / len(micro_batches)
        if run.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), run.max_grad_norm)
        if inspect:
            inspect("before", losia, None)
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        if inspect:
            inspect("after", losia, None)
        return total

    step.groups = optimizer.param_groups
    return losia, step, losia.detach


def _wrap(engine: str, model: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """The model as this engine holds it: alone, DDP, FSDP2 in its forms, or HSDP on a 2 x N mesh."""
    if engine == "one":
        return model
    if engine == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False)
    world = dist.get_world_size()
    shape, names = ((2, world // 2), ("replicate", "shard")) if engine == "hsdp" else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": engine != "fsdp2-noreshard"}
    if engine == "fsdp2-offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if dtype == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _deepspeed_loop(name: str, model: torch.nn.Module, config: LoSiAConfig, run: Run):
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    world = dist.get_world_size()
    settings = {
        "train_micro_batch_size_per_gpu": run.batch // world,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": run.max_grad_norm,
        "bf16": {"enabled": run.dtype == "bf16"},
        **run.deepspeed,
    }
    # By default stage 3 would keep weights as small as these whole, or gathered from forward to backward; here it really
    # partitions them, and gathers them again.
    zero: dict[str, Any] = {"stage": int(name[4]), "reduce_bucket_size": 100_000}
    if name.endswith("-offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        if zero["stage"] == 3:
            zero["offload_param"] = {"device": "cpu"}
    for limit in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
        zero[f"stage3_{limit}"] = 0
    settings["zero_optimization"] = {**zero, **run.deepspeed.get("zero_optimization", {})}
    named = None
    if run.optimizer:
        get_losia_model(model, config)
        named = optimizer_of(run)(losia_parameter_groups(model, lr=RATE), lr=RATE)
    engine, optimizer, _, _ = initialize(model=model, losia_config=config, config=settings, lr=RATE, optimizer=named)
    managed = settings.get("managed_gradient_accumulation", True)  # or step() is called once a step

    def step(micro_batches, inspect):
        total = 0.0
        for place, batch in enumerate(micro_batches):
            loss = engine(**batch, use_cache=False).loss
            last = place == len(micro_batches) - 1
            engine.backward(loss)
            if inspect and last:
                inspect("before", engine.losia, engine)
            if managed or last:
                engine.step()
            total += loss.item() / len(micro_batches)
        if inspect:
            inspect("after", engine.losia, engine)
        return total

    step.groups = optimizer.param_groups

    def close():
        engine.losia.detach()
        engine.destroy()

    return engine.losia, step, close


def variant(run: Run, **changes: Any) -> Run:
    return replace(run, **changes)
