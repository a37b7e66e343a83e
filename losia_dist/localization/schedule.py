"""How many groups localize in a slot, so that all of them do as often as the configuration asks in a run of this length."""

from __future__ import annotations

from dataclasses import replace

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.formulas import layers_per_slot_for


def resolve_layers_per_slot(config: LoSiAConfig, total_steps: int | None, num_groups: int, world_size: int) -> LoSiAConfig:
    """The configuration with layers_per_slot="auto" resolved for a run of this length.

    Raises:
        ConfigError: the length is not known, or too short for one slot a cycle.
    """
    if config.layers_per_slot != "auto":
        return config
    if total_steps is None:
        raise ConfigError(
            "layers_per_slot='auto' needs the length of the run: pass total_steps, the optimizer steps of the whole run, or "
            "give a number."
        )
    groups = layers_per_slot_for(total_steps, num_groups, config.period, config.cycles)
    if groups is None:
        raise ConfigError(
            f"layers_per_slot='auto': {total_steps} steps are too few for {config.cycles} cycle(s) of slots of {config.period} "
            f"steps (period): at least {config.period * config.cycles + 1} are needed. Lower period or cycles, or train longer."
        )
    ranks = world_size if config.by_rank else 1
    return replace(config, layers_per_slot=-(-groups // ranks))


def layers_per_slot(config: LoSiAConfig) -> int:
    """Of a configuration that `resolve_layers_per_slot` has seen."""
    assert isinstance(config.layers_per_slot, int)
    return config.layers_per_slot
