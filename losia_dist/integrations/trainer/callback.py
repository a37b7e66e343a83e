"""`LoSiACallback`: moves the conductor from the events of Transformers' Trainer, whatever engine runs underneath."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.integrations.trainer.tracker_config import tell_trackers
from losia_dist.model import count_trainable
from losia_dist.run.conductor import LoSiA
from losia_dist.run.finite import refuse_skipped
from losia_dist.run.log_files import FACTS, MEMORY
from losia_dist.run.memory_kinds import write_memory
from losia_dist.run.run_facts import GB, peak_memory, write_facts
from losia_dist.run.subnet_log import SubnetLog


class LoSiACallback(TrainerCallback):
    """Makes the conductor when training begins and calls it once per optimizer step. `LoSiATrainerMixin` adds it.

    `on_train_begin` comes after Accelerate has wrapped the model and the optimizer, and `on_optimizer_step` directly after
    the optimizer's step and before the gradients are cleared: once per accumulation boundary, and under DeepSpeed after the
    last `accelerator.backward`, which holds the engine's step. A step that the engine skipped does not move the clock.
    Every event runs on every rank.

    By itself, in a plain `transformers.Trainer`, it needs a model from `get_losia_model`, an optimizer from
    `losia_parameter_groups` passed as `optimizers=(optimizer, None)`, and `save_strategy="no"`: that Trainer would write
    checkpoints of weights without their subnets' present values. Keep the result with
    `export_model(callback.losia, directory)`.

    On the first rank it writes `subnets.jsonl`, `losia_run.json` and `losia_config.json` into `output_dir`, which
    `losia-dist report` reads beside the Trainer's own logs. Where they cannot be written, a warning says so.

    Args:
        losia_config: the configuration the model was converted with.

    Attributes:
        losia: the conductor, from the beginning of training on; it stays after its end, for exports.

    Raises:
        ConfigError: (when training begins) no configuration, or what `LoSiA` refuses.
        UnsupportedError: (when training begins) a plain Trainer that saves checkpoints, or resumes from one.
    """

    def __init__(self, losia_config: LoSiAConfig | None = None) -> None:
        self.losia_config = losia_config
        self.losia: LoSiA | None = None
        # Set by a trainer that exports instead of saving its state dict, and resumes once the conductor is there.
        self.saves_plain_models = False
        self.before_made: Callable[[], None] | None = None
        self.when_made: Callable[[LoSiA], None] | None = None
        # The trainer's own loss of a batch, for calibration; None: the model's.
        self.compute_loss: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None
        # The trainer's callbacks, of which trackers are told of LoSiA's settings.
        self.others: Sequence[Any] = ()
        self._localized: list[str] = []
        self._experts: dict[str, float] = {}
        self._subnets: SubnetLog | None = None
        self._device = torch.device("cpu")
        self._memory_written = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.losia_config is None:
            raise ConfigError("LoSiACallback has no configuration: use LoSiACallback(losia_config), or LoSiATrainer.")
        saving = str(getattr(args.save_strategy, "value", args.save_strategy))
        asked = "enable_jit_checkpoint=True" if getattr(args, "enable_jit_checkpoint", False) else None
        asked = asked if saving == "no" else f"save_strategy={saving!r}"
        if not self.saves_plain_models and asked is not None:
            raise UnsupportedError(
                f"{asked}: a plain Trainer with LoSiACallback would save weights without their subnets' values. Use "
                "LoSiATrainer (or LoSiATrainerMixin), or save_strategy='no' and export_model(callback.losia, ...)."
            )
        if not self.saves_plain_models and state.global_step > 0:
            raise UnsupportedError(
                f"a plain Trainer with LoSiACallback cannot resume (it is at step {state.global_step}): its checkpoints hold "
                "no subnets. Use LoSiATrainer (or LoSiATrainerMixin), or take resume_from_checkpoint out."
            )
        if self.losia is not None:  # train() called again
            self._stop_log()
            self.losia.detach()
        if self.before_made is not None:
            self.before_made()
        optimizer = kwargs["optimizer"]
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self.losia = LoSiA(kwargs["model"], optimizer, self.losia_config, total_steps=state.max_steps, watch=True)
        self._localized, self._device, self._memory_written = [], args.device, False
        if state.is_world_process_zero:
            self._subnets = SubnetLog(self.losia)
        if self.when_made is not None:
            self.when_made(self.losia)
        if not self.losia.located:
            self.losia.locate(self._first_batches(kwargs["train_dataloader"]), self.compute_loss)
        if self._subnets is not None:
            tell_trackers(self.others, self.losia_config)
            self._describe(args, state)
            self._subnets.begin(Path(args.output_dir), continues=state.global_step > 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.losia is not None
        localizing, steps = self.losia.localizing, self.losia.steps
        self.losia.step()
        if self.losia.steps == steps:
            self.losia.discard_step()
            if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
                refuse_skipped(steps + 1)
        else:
            self._localized = localizing
        if self._subnets is not None:
            self._subnets.write()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log and self.losia is not None:  # on all ranks alike
            self._experts = {f"losia/{name}": value for name, value in self.losia.expert_load.read().items()}
        if self._subnets is not None and (state.global_step == state.max_steps or not self._memory_written):
            self._memory_written = True
            self._count_memory(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.losia is not None
        self._stop_log()
        self.losia.consolidate()

    def metrics(self) -> dict[str, float]:
        """Of the latest optimizer step, for logging: the groups' true learning rates, and which group localized.

        "losia/lowest_learning_rate", mean and highest: over the groups, rewarming included ("learning_rate" is the
        scheduler's); each group's own is in `learning_rates`. "losia/localizing": place of the (first) localizing group in
        localization order, from 0; with several per slot, those that follow it too. It is left out where subnets are drawn,
        and nothing localizes.
        "losia/experts_trained" and "losia/experts_busiest": of a mixture of experts (`ExpertLoad.read`).
        "losia/peak_memory_gb": what this rank held at most so far, in 10^9 bytes, on its GPU or as a process on a CPU.
        """
        if self.losia is None or not self._localized:
            return {}
        rates = [*self.losia.learning_rates().values()]
        found = {
            "losia/lowest_learning_rate": min(rates),
            "losia/mean_learning_rate": sum(rates) / len(rates),
            "losia/highest_learning_rate": max(rates),
            **self._experts,
            "losia/peak_memory_gb": peak_memory(self._device) / GB,
        }
        if self.losia.config.located is not None:
            found["losia/localizing"] = self.losia.clock.names.index(self._localized[0])
        return found

    def learning_rates(self) -> dict[str, float]:
        """ "losia/learning_rate/<group>" of the latest optimizer step, rewarming included. A tracker would make a chart of
        each: they go into the Trainer's log history alone."""
        if self.losia is None or not self._localized:
            return {}
        return {f"losia/learning_rate/{name}": rate for name, rate in self.losia.learning_rates().items()}

    def _describe(self, args: Any, state: Any) -> None:
        losia = self.losia
        assert losia is not None and self.losia_config is not None
        facts = {
            "method": "losia",
            "engine": f"Trainer, {AcceleratorState().distributed_type.value}",
            "ranks": args.world_size,
            "steps": state.max_steps,
            "trainable_parameters": count_trainable(losia.model),
            "groups_per_slot": losia.clock.per_slot,
            "options": args.to_sanitized_dict(),
        }
        try:
            write_facts(Path(args.output_dir), self.losia_config, losia.clock.names, self._device, **facts)
        except OSError as error:
            warnings.warn(f"{FACTS} cannot be written ({error}): the run's report will lack it.", stacklevel=2)

    def _count_memory(self, args: Any, state: Any) -> None:
        losia = self.losia
        assert losia is not None
        parts = (losia.model, losia.state.optimizer, losia.accumulators.values(), self._device)
        try:
            write_memory(Path(args.output_dir), state.global_step, *parts)
        except OSError as error:
            warnings.warn(f"{MEMORY} cannot be written ({error}): the run's report will lack it.", stacklevel=2)

    def _first_batches(self, loader: Any) -> list[Any]:
        """The batches that training begins with, as many as calibration asks for; the order of the data stays what it was."""
        assert self.losia is not None
        device = self._device
        if hasattr(loader, "sp_group"):  # DeepSpeed's, which deals one batch after the other to the ranks of a sequence
            names = ("sp_rank", "sp_group", "sp_world_size", "device")
            loader = type(loader)(loader.dl, **{name: getattr(loader, name) for name in names})
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            batches = list(itertools.islice(loader, self.losia.config.calibration_batches))
        if hasattr(loader, "end"):
            loader.end()  # Accelerate keeps a loader for active until it has run to its end
        return [send_to_device(batch, device) for batch in batches]

    def _stop_log(self) -> None:
        if self._subnets is not None:
            self._subnets.close()
            self._subnets = None
