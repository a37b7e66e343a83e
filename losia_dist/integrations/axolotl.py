"""LoSiA as a plugin of axolotl: `plugins: [losia_dist.integrations.axolotl.LoSiAPlugin]`, and `losia:` with its settings.

The one module of the package that imports axolotl, which loads it by that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.integrations.trainer.trainer import LoSiATrainerMixin

_REFUSED = {
    "adapter": "LoSiA trains the weights themselves: remove it",
    "relora": "LoSiA trains the weights themselves: remove it",
    "load_in_4bit": "the weights that subnets are written into must be whole: load in bf16",
    "load_in_8bit": "the weights that subnets are written into must be whole: load in bf16",
    "qat": "the weights that subnets are written into must be whole: remove it",
    "rl": "axolotl makes its RL trainers without a plugin's class; `losia-dist dpo`, `kto` and `grpo` train them",
    "reward_model": "axolotl's reward trainer takes no plugin's class; `losia-dist reward` trains one",
    "process_reward_model": "axolotl's reward trainer takes no plugin's class",
    "fix_untrained_tokens": "it changes the embedding behind the trainer's back: remove it",
}


class LoSiAArgs(BaseModel):
    """What a YAML may say: `losia:` with fields of `LoSiAConfig`, the name of a preset, or a file."""

    losia: dict[str, Any] | str | None = None


class LoSiAAxolotlTrainer(LoSiATrainerMixin, AxolotlTrainer):
    """axolotl's trainer that trains subnets."""


class LoSiAPlugin(BasePlugin):
    """Puts the mixin over axolotl's trainer, and lets it save the model. Raises: LoSiAError for what LoSiA does not do."""

    _trainer: Any = None
    _is_saved = False

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Refuse at once, before data or weights are read."""
        if not cfg.get("losia"):
            raise ConfigError("axolotl: `losia:` is missing: give LoSiA's settings, a preset (losia: short) or a file.")
        _config(cfg["losia"])
        for name, why in _REFUSED.items():
            if cfg.get(name):
                raise UnsupportedError(f"axolotl: {name}: {cfg[name]} is not supported with LoSiA: {why}.")

    def get_input_args(self) -> str:
        """The model that axolotl checks the YAML with."""
        return "losia_dist.integrations.axolotl.LoSiAArgs"

    def get_trainer_cls(self, cfg: Any) -> type[LoSiAAxolotlTrainer]:
        """The trainer with the YAML's settings."""
        config = _config(cfg["losia"])

        class Configured(LoSiAAxolotlTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, losia_config=config, **kwargs)

        Configured.__name__ = LoSiAAxolotlTrainer.__name__
        return Configured

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Keep the trainer, which alone can save what was trained."""
        self._trainer, self._is_saved = trainer, False

    def post_train(self, cfg: Any, model: Any) -> None:
        """Save the plain model, on all ranks. axolotl calls this right after training, and again when its ranks have parted; in
        between it would save the converted model, which refuses that."""
        if self._is_saved or self._trainer is None:
            return
        self._trainer.save_model(cfg["output_dir"])
        for converted in (model, self._trainer.accelerator.unwrap_model(model)):
            converted.save_pretrained = _saved_already
        self._is_saved, self._trainer = True, None


def _config(given: Any) -> LoSiAConfig:
    if isinstance(given, str | Path):
        return LoSiAConfig.read(given)
    return LoSiAConfig.from_dict(dict(given), source="losia")


def _saved_already(*_: Any, **__: Any) -> None:
    """What axolotl calls to save the model once more."""
