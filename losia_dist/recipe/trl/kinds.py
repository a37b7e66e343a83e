"""What each command trains: TRL's trainer and configuration, and what a record of its data must have."""

from __future__ import annotations

from typing import Any, NamedTuple

from losia_dist.errors import ConfigError


class Kind(NamedTuple):
    """trainer, config: names in `trl`. needs: keys of a record. about: for --help."""

    trainer: str
    config: str
    needs: tuple[str, ...]
    about: str


KINDS = {
    "dpo": Kind("DPOTrainer", "DPOConfig", ("chosen", "rejected"), "prompt, chosen and rejected"),
    "kto": Kind("KTOTrainer", "KTOConfig", ("prompt", "completion", "label"), "prompt, completion and label (true or false)"),
    "reward": Kind("RewardTrainer", "RewardConfig", ("chosen", "rejected"), "chosen and rejected, with or without prompt"),
    "grpo": Kind("GRPOTrainer", "GRPOConfig", ("prompt",), "prompt, and what the reward function reads"),
}


def classes_of(kind: str) -> tuple[Any, Any]:
    """TRL's trainer class under the mixin, and its configuration.

    Raises:
        ConfigError: TRL is not installed, or a release without this trainer.
    """
    try:
        import trl

        trainer, config = getattr(trl, KINDS[kind].trainer), getattr(trl, KINDS[kind].config)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"losia-dist {kind} needs TRL 1.16 or later ({error}): pip install 'losia_dist[trl]'.") from error
    from losia_dist.integrations.trainer.trainer import LoSiATrainerMixin

    class LoSiATRLTrainer(LoSiATrainerMixin, trainer):  # type: ignore[misc, valid-type]
        """TRL's trainer that trains subnets."""

    LoSiATRLTrainer.__name__ = LoSiATRLTrainer.__qualname__ = f"LoSiA{KINDS[kind].trainer}"
    return LoSiATRLTrainer, config
