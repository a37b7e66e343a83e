"""`LoSiACallback`: moves the conductor from the events of Transformers' Trainer, whatever engine runs underneath."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback

from losia_dist.conductor import LoSiA
from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError


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
        self.when_made: Callable[[LoSiA], None] | None = None
        self._localized: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.losia_config is None:
            raise ConfigError("LoSiACallback has no configuration: use LoSiACallback(losia_config), or LoSiATrainer.")
        saving = str(getattr(args.save_strategy, "value", args.save_strategy))
        if not self.saves_plain_models and saving != "no":
            raise UnsupportedError(
                f"save_strategy={saving!r}: a plain Trainer with LoSiACallback would save weights without their subnets' "
                "values. Use LoSiATrainer (or LoSiATrainerMixin), or save_strategy='no' and export_model(callback.losia, ...)."
            )
        if not self.saves_plain_models and state.global_step > 0:
            raise UnsupportedError(
                f"a plain Trainer with LoSiACallback cannot resume (it is at step {state.global_step}): its checkpoints hold "
                "no subnets. Use LoSiATrainer (or LoSiATrainerMixin), or take resume_from_checkpoint out."
            )
        if self.losia is not None:  # train() called again
            self.losia.detach()
        optimizer = kwargs["optimizer"]
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self.losia = LoSiA(kwargs["model"], optimizer, self.losia_config)
        self._localized = []
        if self.when_made is not None:
            self.when_made(self.losia)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.losia is not None
        localizing, steps = self.losia.localizing, self.losia.steps
        self.losia.step()
        if self.losia.steps == steps:
            self.losia.discard_step()
        else:
            self._localized = localizing

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.losia is not None
        self.losia.consolidate()

    def metrics(self) -> dict[str, float]:
        """Of the latest optimizer step, for logging: each group's true learning rate, and which group localized.

        "losia/learning_rate/<group>": rewarming included ("learning_rate" is the scheduler's). "losia/localizing": place of
        the (first) localizing group in localization order, from 0; with several per slot, those that follow it too.
        """
        if self.losia is None or not self._localized:
            return {}
        rates = {f"losia/learning_rate/{name}": rate for name, rate in self.losia.learning_rates().items()}
        return {**rates, "losia/localizing": self.losia.clock.names.index(self._localized[0])}
