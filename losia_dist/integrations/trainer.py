"""`LoSiATrainer` and `LoSiATrainerMixin`: LoSiA in Transformers' Trainer and in TRL's SFTTrainer and DPOTrainer."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DummyOptim
from torch.optim import Optimizer
from transformers import Trainer

from losia_dist.checkpoint.export import save_whole_model
from losia_dist.conductor import LoSiA
from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.guard import check_same_on_all_ranks
from losia_dist.integrations.best_model import check_restorable, load_plain_weights
from losia_dist.integrations.callback import LoSiACallback
from losia_dist.integrations.trainer_checks import refuse_arguments, refuse_engine
from losia_dist.model import get_losia_model
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.subnet.convert import subnet_layers
from losia_dist.subnet.groups import GROUP_KEY, losia_parameter_groups

logger = logging.getLogger(__name__)


class LoSiATrainerMixin:
    """Put before a trainer class: `class MySFTTrainer(LoSiATrainerMixin, SFTTrainer): ...` (also DPOTrainer).

    Works in one process, under DDP, DeepSpeed (stages 0 to 3) and FSDP2; all ranks make and use it alike.

    - The model is converted after the trainer's own `__init__`, unless it has subnets already.
    - Optimizer: `optim="adamw_torch"` and "adamw_torch_fused" (the default) mean `LoSiAAdamW`, one group per decoder layer,
      with learning_rate, adam_beta1, adam_beta2, adam_epsilon (the paper's is 1e-6) and weight_decay of the arguments;
      other `optim` values are refused. `optimizers=(optimizer, scheduler)` built from `losia_parameter_groups(model, ...)`
      is used as it is, and so is an "optimizer" in the DeepSpeed configuration. Any scheduler works; rewarming multiplies it.
    - Importance comes from the gradient that trains: the mean over ranks and micro-batches as the Trainer scales the loss,
      before clipping. `max_grad_norm` clips the subnets' gradients (and whatever else trains).
    - Logs carry each group's true learning rate and the localizing group (`LoSiACallback.metrics`).
    - `save_model` and checkpoints hold a plain Transformers model. Checkpoints hold no LoSiA state in this version:
      `load_best_model_at_end` works, `resume_from_checkpoint` is refused.

    Args:
        losia_config: keyword only; the same on every rank. Everything else is the trainer's.

    Raises:
        ConfigError, UnsupportedError: before training, for what the support matrix refuses; the message names the fix.
    """

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Any
    processing_class: Any
    data_collator: Any
    state: Any
    is_deepspeed_enabled: bool

    def __init__(self, *args: Any, losia_config: LoSiAConfig, **kwargs: Any) -> None:
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        refuse_arguments(type(self), bound.arguments, losia_config)
        super().__init__(*args, **kwargs)
        refuse_engine(self)
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        check_same_on_all_ranks("the LoSiA configuration", losia_config.to_dict(), group)
        self.losia_config = losia_config
        self.losia_callback = LoSiACallback(losia_config)
        self.losia_callback.saves_plain_models = True
        self._add_own_callback()
        if not subnet_layers(self.model):
            get_losia_model(self.model, losia_config)

    @property
    def losia(self) -> LoSiA | None:
        """The conductor, from the beginning of training on."""
        return self.losia_callback.losia

    # The seam to checkpoints that a run can be resumed from.

    def save_training_state(self, directory: str) -> None:
        """Called on every rank for each checkpoint, after the model was written, to add what a resume needs.

        This version adds nothing: a checkpoint holds the plain model, the Trainer's state and the random states.
        """

    def load_training_state(self, directory: str | bool) -> None:
        """Called on every rank when training is to resume from a checkpoint (True: the newest one).

        Raises:
            UnsupportedError: in this version, always.
        """
        raise UnsupportedError(
            f"resume_from_checkpoint={directory!r}: checkpoints of this version hold the model and not LoSiA's optimizer and "
            "subnets, so a resumed run would silently differ. Start a new run from the checkpoint's model with from_pretrained."
        )

    # What the Trainer calls.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint` is refused in this version."""
        if resume_from_checkpoint:
            self.load_training_state(resume_from_checkpoint)
        if self.args.save_strategy != "no" and self.args.should_save:
            logger.warning("Checkpoints hold the trained model; this version cannot resume a run from them.")
        return super().train(None, *args, **kwargs)  # type: ignore[misc]

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
        """As `Trainer.log`, with LoSiA's entries in the logs of training steps."""
        if "loss" in logs:
            logs.update(self.losia_callback.metrics())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as it computes now, as a plain Transformers directory. Called on all ranks; rank 0 writes."""
        directory = output_dir or self.args.output_dir
        model = self.model
        if self.losia is not None:
            self.losia.consolidate()
            model = self.losia.model
        save_whole_model(model, directory)
        if _internal_call and self.args.load_best_model_at_end:
            check_restorable(model, directory)  # an error at the first checkpoint, not at the end of the run
        if self.args.should_save:
            processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processor is not None:
                processor.save_pretrained(directory)
            torch.save(self.args, os.path.join(directory, "training_args.bin"))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.save_training_state(output_dir)

    def _load_best_model(self) -> None:
        assert self.losia is not None
        load_plain_weights(self.losia, self.state.best_model_checkpoint, self.args.device)

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

    def _add_own_callback(self) -> None:
        handler = self.callback_handler  # type: ignore[attr-defined]
        if any(isinstance(callback, LoSiACallback) for callback in handler.callbacks):
            raise ConfigError("LoSiATrainerMixin adds LoSiACallback itself: remove it from callbacks.")
        handler.add_callback(self.losia_callback)


class LoSiATrainer(LoSiATrainerMixin, Trainer):
    """Transformers' Trainer with LoSiA: `LoSiATrainer(model=model, args=training_args, losia_config=config, ...)`.

    See `LoSiATrainerMixin` for what it does and refuses.
    """
