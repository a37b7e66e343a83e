"""Runs of LoSiATrainer on every engine, with the keys of tests.support.training; functions here run on ranks of the pool."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from losia_dist import LoSiAConfig, LoSiATrainer
from tests.support.training import RATE, Run, build, global_batches, weight_key

WARMUP = 2


def linear_rate(step: int, steps: int) -> float:
    """Transformers' "linear" schedule with `WARMUP` steps, at the 0-based optimizer step."""
    return RATE * (step / WARMUP if step < WARMUP else (steps - step) / (steps - WARMUP))


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in class attributes and in the environment; other tests shall not see it."""
    kept = {name: os.environ.get(name) for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_")) and n not in kept]:
            del os.environ[name]
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()


class FSDPOnCPU:
    """Before a trainer class: lets Accelerate shard on a CPU, where it would drop FSDP, by its code for GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.accelerator.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(self.accelerator.mixed_precision)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True


class TrainerOnCPU(FSDPOnCPU, LoSiATrainer):
    """FSDP2 on a CPU too."""


class Recorder(TrainerCallback):
    """The loss of each step and the subnets chosen at each slot's end, under the keys of tests.support.training."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.history: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losia = self.trainer.losia
        located = self.trainer.losia_config.located is not None
        if located and state.global_step % self.trainer.losia_config.period == 0:
            name = losia.clock.names[self.trainer.losia_callback.metrics()["losia/localizing"]]
            layers = [layer for layer in losia.sites if layer.group_name == name]
            chosen = {weight_key(layer): (layer.row_index.clone(), layer.col_index.clone()) for layer in layers}
            self.history.append((state.global_step - 1, name, chosen))


def arguments(directory: str, run: Run, engine: str = "one", **changes: Any) -> TrainingArguments:
    """Training arguments that make the Trainer do what `tests.support.training.reference` does."""
    world = int(os.environ["WORLD_SIZE"]) if engine != "one" else 1
    settings: dict[str, Any] = {
        "output_dir": directory,
        "use_cpu": True,
        "per_device_train_batch_size": run.batch // world,
        "per_device_eval_batch_size": run.batch // world,
        "gradient_accumulation_steps": run.accumulation,
        "max_steps": run.steps,
        "max_grad_norm": run.max_grad_norm,
        "learning_rate": RATE,
        "adam_epsilon": 1e-6,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if engine.startswith("zero"):
        zero = {"stage": int(engine[4]), "reduce_bucket_size": 100_000}
        for limit in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
            zero[f"stage3_{limit}"] = 0  # really partition weights as small as these
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero,
            **run.deepspeed,
        }
    if engine == "fsdp2":
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": [{"llama": "LlamaDecoderLayer"}.get(run.family, "Qwen3MoeDecoderLayer")],
        }
    return TrainingArguments(**{**settings, **changes})


def examples(run: Run) -> list[dict[str, torch.Tensor]]:
    """The sequences of `global_batches`, one by one: in this order Accelerate deals them to the ranks as that does."""
    return [
        {"input_ids": ids, "labels": ids}
        for micro_batches in global_batches(run)
        for batch in micro_batches
        for ids in batch["input_ids"]
    ]


def masked(example: dict[str, torch.Tensor], place: int) -> dict[str, torch.Tensor]:
    """The example with another number of labels than its neighbours."""
    labels = example["labels"].clone()
    labels[: 1 + (place * 5) % 9] = -100
    return {**example, "labels": labels}


def trainer_of(
    directory: str,
    engine: str,
    run: Run,
    *,
    callbacks: Any = (),
    mask: bool = False,
    load_from: str | None = None,
    **changes: Any,
) -> Any:
    """A trainer over the run's model and data; `changes` of the training arguments.

    mask: give each example its own number of labels. load_from: read the model from this directory, as users do.
    """
    model = None if load_from else build(run)
    args = arguments(directory, run, engine, **changes)
    data = examples(run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.dtype]
    # Read after the arguments were made, a model comes partitioned under ZeRO-3.
    model = model or LlamaForCausalLM.from_pretrained(load_from)
    return TrainerOnCPU(
        model=model.to(dtype),
        args=args,
        train_dataset=[masked(example, place) for place, example in enumerate(data)] if mask else data,
        eval_dataset=data[: 2 * run.batch],
        losia_config=LoSiAConfig(**run.config),
        callbacks=list(callbacks),
    )


def train_with_trainer(directory: str, engine: str, run: Run, inspect: Any = None, **changes: Any) -> dict[str, Any]:
    """As `tests.support.training.train`, plus "log" (the Trainer's), "engine", what really ran, and "inspected".

    `inspect(trainer)`, if given, is called after training; its result is kept.
    """
    with fresh_accelerate():
        recorder = Recorder()
        trainer = recorder.trainer = trainer_of(directory, engine, run, callbacks=[recorder], **changes)
        trainer.train()
        inspected = inspect(trainer) if inspect else None
        result = result_of(trainer)
        result |= {"history": recorder.history, "inspected": inspected}
        close(trainer)
        return result


def result_of(trainer: Any) -> dict[str, Any]:
    """Losses, whole weights and the log of a finished run, on every rank."""
    losia = trainer.losia
    plain = getattr(losia.model, "module", losia.model)
    weights = {n: losia.parameters.read_whole(p).float() for n, p in plain.named_parameters(remove_duplicate=False)}
    log = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "weights": {n: w for n, w in weights.items() if not re.search(r"[._]subnet(_\d+)?$", n)},
        "log": log,
        "engine": {
            "type": trainer.accelerator.distributed_type.value,
            "world size": losia.collectives.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
            "sharded": all(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in plain.parameters()),
        },
    }


def close(trainer: Any) -> None:
    """Let the next test on this rank start afresh."""
    trainer.losia.detach()
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
