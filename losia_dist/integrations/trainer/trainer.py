"""`LoSiATrainer` and `LoSiATrainerMixin`: LoSiA in Transformers' Trainer and in TRL's SFTTrainer and DPOTrainer."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils.deepspeed import DummyOptim  # not in accelerate.utils of releases where DeepSpeed is missing
from torch.optim import Optimizer
from transformers import Trainer

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.export.live import save_whole_model
from losia_dist.export.model_card import write_card
from losia_dist.integrations.deepspeed.engine_checkpoint import EngineCounters
from losia_dist.integrations.trainer.best_model import load_plain_weights
from losia_dist.integrations.trainer.callback import LoSiACallback
from losia_dist.integrations.trainer.jit_checkpoint import take_over
from losia_dist.integrations.trainer.refusals import refuse_arguments, refuse_engine
from losia_dist.integrations.trainer.rollout import HandOver, check_kind
from losia_dist.integrations.trainer.rollout import take_over as take_over_weights
from losia_dist.integrations.trainer.sequences import in_one_piece, prepare_sequences
from losia_dist.integrations.trainer.trainer_checkpoint import TrainerCheckpoints, warn_of_data
from losia_dist.integrations.trainer.trial_save import try_to_save
from losia_dist.integrations.trainer.wrapping import (
    engine_settings,
    forget_preparation,
    refuse_evaluation_first,
    refuse_unwrapped,
)
from losia_dist.model import get_losia_model
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.conductor import LoSiA
from losia_dist.run.run_facts import GB
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.groups import GROUP_KEY, losia_parameter_groups


class LoSiATrainerMixin:
    """Put before a trainer class: `class MySFTTrainer(LoSiATrainerMixin, SFTTrainer): ...` (also DPOTrainer).

    Works in one process, under DDP, DeepSpeed (stages 0 to 3) and FSDP2; all ranks make and use it alike.

    - The model is converted after the trainer's own `__init__`, unless it has subnets already; a quantized model before.
    - Optimizer: `optim="adamw_torch"` and "adamw_torch_fused" (the default) mean `LoSiAAdamW`, one group per decoder layer,
      with learning_rate, adam_beta1, adam_beta2, adam_epsilon (the paper's is 1e-6) and weight_decay of the arguments;
      other `optim` values are refused. `optimizers=(optimizer, scheduler)` built from `losia_parameter_groups(model, ...)`
      is used as it is, and so is an "optimizer" in the DeepSpeed configuration. Any scheduler works; rewarming multiplies it.
    - Importance comes from the gradient that trains: the mean over ranks and micro-batches as the Trainer scales the loss,
      before clipping. `max_grad_norm` clips the subnets' gradients (and whatever else trains).
    - `Located(start="importance")`, `Drawn(outlier_limit=...)`: the first subnets are located, or drawn, from the first
      `calibration_batches` batches of the training data, by the trainer's own loss; `layers_per_slot="auto"` follows
      `max_steps`.
    - Logs carry the groups' true learning rates and the localizing group (`LoSiACallback.metrics`).
    - `save_model` and checkpoints hold a plain Transformers model. `output_dir/_losia_state` holds what resuming needs
      besides, for all checkpoints of the run (the base once); it is rotated with them.
    - `enable_jit_checkpoint=True`: on SIGTERM all ranks save at the end of the same step, the one in progress or the next, and
      `train` returns.
    - What only a save would fail with (generation_config, tokenizer, output_dir) is tried before the first step.
    - `ParallelismConfig(sp_size=N, sp_backend="deepspeed")`: N ranks compute each sequence together. Batches are filled up to a
      length that N divides, and get position_ids where they have none; evaluation is of each rank's own sequences, as
      Accelerate's is.
    - `evaluate` and `predict` may come before `train` (one process, DDP, ZeRO-3), and `train` again: under DeepSpeed with a new
      optimizer state, elsewhere with the old one.
    - `train(resume_from_checkpoint=True)`, or a path of a `checkpoint-N`, goes on bit for bit on the same engine and ranks, to
      rounding on others; with iterable data while its first pass lasts, and not with ignore_data_skip (a warning says so).
      Make the trainer as for the first start, from the base model. `save_only_model` checkpoints cannot be resumed from.

    Args:
        losia_config: keyword only; the same on every rank. Everything else is the trainer's.
        hand_over: what a rollout engine gets (use_vllm=True in GRPO and RLOO): "whole" weights, or "changes" for a server that
            takes them (`integrations/trainer/rollout.py`). `trainer.hand_over.bytes` counts.

    Raises:
        ConfigError, UnsupportedError: before training, for what the support matrix refuses; the message names the fix.
    """

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    callback_handler: Any
    data_collator: Any
    state: Any
    control: Any
    train_dataset: Any
    is_deepspeed_enabled: bool

    def __init__(self, *args: Any, losia_config: LoSiAConfig, hand_over: str = "whole", **kwargs: Any) -> None:
        check_kind(hand_over)
        self.hand_over: HandOver | None = None
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        refuse_arguments(type(self), bound.arguments, losia_config)
        if getattr(bound.arguments.get("model"), "is_quantized", False):
            get_losia_model(bound.arguments["model"], losia_config)  # trainers refuse quantized models without adapters
        super().__init__(*args, **kwargs)
        refuse_engine(self)
        prepare_sequences(self, losia_config)
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        Agreement(group, is_own=True).same("the LoSiA configuration", losia_config.to_dict())
        self.losia_config = losia_config
        self._engine_settings = engine_settings(self)
        self.losia_callback = LoSiACallback(losia_config)
        self.losia_callback.saves_plain_models = True
        self.losia_callback.before_made = self._note_engine
        self.losia_callback.when_made = self._start
        self.losia_callback.compute_loss = self._calibration_loss
        self._checkpoints = TrainerCheckpoints(group)
        if any(isinstance(callback, LoSiACallback) for callback in self.callback_handler.callbacks):
            raise ConfigError("LoSiATrainerMixin adds LoSiACallback itself: remove it from callbacks.")
        self.callback_handler.add_callback(self.losia_callback)
        self.losia_callback.others = self.callback_handler.callbacks
        self._at_step_end = take_over(self)
        if not find_sites(self.model):
            get_losia_model(self.model, losia_config)
        take_over_weights(self, hand_over)

    @property
    def losia(self) -> LoSiA | None:
        """The conductor, from the beginning of training on."""
        return self.losia_callback.losia

    # What the Trainer calls.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True resumes from the newest checkpoint that is complete. Called on all ranks.

        Raises:
            CheckpointError: on every rank, before the first step: the checkpoint lacks LoSiA's state, is damaged, or another
                model's or configuration's; or `output_dir` holds another run's checkpoints.
        """
        if resume_from_checkpoint and not hasattr(Trainer, "_prepare_for_training"):
            raise UnsupportedError(
                f"resume_from_checkpoint needs Transformers 5.3 or later; this is {transformers.__version__}. Upgrade it."
            )
        saving = str(getattr(self.args.save_strategy, "value", self.args.save_strategy))
        saves = (saving != "no" or self._at_step_end.wanted) and not self.args.save_only_model
        resume_from_checkpoint = self._checkpoints.choose(self.args.output_dir, resume_from_checkpoint, saves)
        if resume_from_checkpoint and self.args.process_index == 0:
            warn_of_data(self.train_dataset, str(resume_from_checkpoint), ignore_data_skip=self.args.ignore_data_skip)
        with self._at_step_end.watched():
            result = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        self._checkpoints.remove_rotated(at_the_end=True)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Raises: UnsupportedError before training where the engine cannot evaluate then."""
        refuse_evaluation_first(self)
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """`LoSiAAdamW` in groups, or the groups for the optimizer that the DeepSpeed configuration names."""
        if self.optimizer is None:
            self.optimizer = LoSiAAdamW(
                self._parameter_groups(self.args.learning_rate, self.args.weight_decay),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        elif isinstance(self.optimizer, DummyOptim):
            settings = self.accelerator.state.deepspeed_plugin.hf_ds_config.config["optimizer"].get("params", {})
            rate, decay = settings.get("lr", self.args.learning_rate), settings.get("weight_decay", self.args.weight_decay)
            self.optimizer.params = self._parameter_groups(rate, decay)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with LoSiA's entries in the logs of training steps; each group's rate in the history alone."""
        is_step = "loss" in logs
        if is_step:
            logs.update(self.losia_callback.metrics())
            logs.update({"losia/handed_over_gb": self.hand_over.bytes / GB} if self.hand_over is not None else {})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
        if is_step and self.state.log_history:
            self.state.log_history[-1].update(self.losia_callback.learning_rates())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as it computes now, as a plain Transformers directory. Called on all ranks; rank 0 writes."""
        directory = output_dir or self.args.output_dir
        model = self.model
        if self.losia is not None:
            self.losia.consolidate()
            model = self.losia.model
        save_whole_model(model, directory, tokenizer=self._processor(), agreement=self._checkpoints.agreement)
        if self.args.should_save:
            torch.save(self.args, os.path.join(directory, "training_args.bin"))
            write_card(directory, self._card_facts())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of `save_model` in the place of the Trainer's or TRL's, which know nothing of LoSiA: before every push."""
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            write_card(self.args.output_dir, self._card_facts())

    def _card_facts(self) -> dict[str, Any]:
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        options = {
            "model": getattr(self.model.config, "_name_or_path", None),
            "learning_rate": self.args.learning_rate,
            "micro_batch": self.args.per_device_train_batch_size,
            "gradient_accumulation": self.args.gradient_accumulation_steps,
            "weight_decay": self.args.weight_decay,
            "seed": self.args.seed,
        }
        return {
            "losia_config": self.losia_config.to_dict(),
            "engine": self.accelerator.distributed_type.value,
            "ranks": self.args.world_size,
            "steps": self.state.global_step,
            "options": options,
            **({"train_loss": float(losses[-1])} if losses else {}),
        }

    # Checkpoints: LoSiA's state is saved in the place of optimizer, scheduler and random states, and loaded when the conductor
    # is there; the Trainer's own loading, which knows no subnets, is left out.

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._at_step_end.due:  # after all other callbacks, and without an evaluation that there may be no time for
            self._at_step_end.due = False
            self.control.should_evaluate, self.control.should_save, self.control.should_training_stop = False, True, True
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        self._checkpoints.remove_rotated()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.losia is not None
        self._checkpoints.save(output_dir, self.losia, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        pass

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        forget_preparation(self, self._engine_settings)
        return super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed; the Trainer would add a step to it
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._checkpoints.restore_random_state()

    def _prepare_inputs(self, inputs: Any) -> Any:
        return in_one_piece(super()._prepare_inputs(inputs))  # type: ignore[misc]

    def _note_engine(self) -> None:
        if self.is_deepspeed_enabled:
            from losia_dist.sharding.handed_over import note_engine

            note_engine(self.model_wrapped)

    def _start(self, losia: LoSiA) -> None:
        refuse_unwrapped(self)
        saving = str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no" or self._at_step_end.wanted
        try_to_save(losia.model, self.args, self._processor(), self._checkpoints.agreement, in_output_dir=saving)
        if self.is_deepspeed_enabled:
            losia.carried["deepspeed"] = EngineCounters(self.model_wrapped)
        self._checkpoints.resume(losia, self.lr_scheduler, goes_on_saving=not self.args.save_only_model)

    def _calibration_loss(self, model: Any, batch: Any) -> Any:
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            return self.compute_loss(model, self._prepare_inputs(batch))  # type: ignore[attr-defined]

    def _load_best_model(self) -> None:
        assert self.losia is not None
        load_plain_weights(self.losia, self.state.best_model_checkpoint, self.args.device, self._checkpoints.agreement)

    def _parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer; norms and biases that train in full are not decayed, as everywhere in the Trainer."""
        groups = losia_parameter_groups(self.model, lr=lr, weight_decay=weight_decay)
        if groups[-1][GROUP_KEY] is not None or not weight_decay:
            return groups
        decayed_names = set(self.get_decay_parameter_names(self.model))  # type: ignore[attr-defined]
        decayed = {id(p) for name, p in self.model.named_parameters() if name in decayed_names}
        rest = groups.pop()
        for decay, params in (
            (weight_decay, [p for p in rest["params"] if id(p) in decayed]),
            (0.0, [p for p in rest["params"] if id(p) not in decayed]),
        ):
            if params:
                groups.append({**rest, "params": params, "weight_decay": decay})
        return groups

    def _processor(self) -> Any:
        """What is saved beside the model, as the Trainer has it; None: nothing."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)


class LoSiATrainer(LoSiATrainerMixin, Trainer):
    """Transformers' Trainer with LoSiA: `LoSiATrainer(model=model, args=training_args, losia_config=config, ...)`.

    See `LoSiATrainerMixin` for what it does and refuses.
    """
