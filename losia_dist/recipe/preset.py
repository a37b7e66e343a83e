"""`--losia` by itself: the preset that fits the run's length, and the learning rate where none was given."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.data import make_loader
from losia_dist.errors import ConfigError
from losia_dist.formulas import cycle_steps

LEARNING_RATE = 5e-5  # the paper's, and full fine-tuning's in the script
SHORT_RATE = 2e-3  # of the short preset: its best in docs/quality.md
_CYCLES = 2  # of the published schedule, that a run needs for located subnets to come round


def count_steps(options: argparse.Namespace, data: Any, **ranks: Any) -> int:
    """Optimizer steps of the run: --max_steps, or --epochs over the data."""
    if options.max_steps:
        return int(options.max_steps)
    batches = len(make_loader(data.train, data.tokenizer, options.micro_batch, seed=options.seed, **ranks))
    return max(1, math.ceil(batches * options.epochs / options.gradient_accumulation))


def choose_preset(options: argparse.Namespace, steps: int) -> tuple[LoSiAConfig, str]:
    """The preset for a run of so many steps, and in words which and why. Each rank by itself.

    Raises: ConfigError for a model's configuration that says no number of layers.
    """
    model = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code).get_text_config()
    layers = getattr(model, "num_hidden_layers", None)
    if layers is None:
        raise ConfigError(
            f"--losia: the configuration of {options.model} has no num_hidden_layers, by which a preset is chosen: name one, "
            "--losia_config short or published."
        )
    published = LoSiAConfig.preset("published")
    needed = _CYCLES * cycle_steps(layers, published.period, 1)
    name, than = ("short", "less") if steps < needed else ("published", "not less")
    said = (
        f"--losia: preset {name!r}, as {steps:,} steps are {than} than {needed:,}, two cycles of the published schedule over "
        f"{layers} layers (--losia_config names another)"
    )
    return (_shortened(steps) if name == "short" else published), said


def _shortened(steps: int) -> LoSiAConfig:
    """The short preset with as many of its cycles as so many steps have slots for."""
    short = LoSiAConfig.preset("short")
    slots = (steps - 1) // short.period
    return replace(short, cycles=min(short.cycles, max(1, slots)), layers_per_slot="auto" if slots else 1)


def learning_rate_for(options: argparse.Namespace, config: LoSiAConfig | None) -> tuple[float, str]:
    """The rate that was given, or the one that fits the configuration; and what is to be said about it."""
    short = LoSiAConfig.preset("short")
    is_short = config is not None and replace(config, cycles=short.cycles, layers_per_slot="auto") == short
    fitting = SHORT_RATE if is_short else LEARNING_RATE
    if options.learning_rate is None:
        return fitting, f"--learning_rate {fitting:g}, as none was given" if is_short else ""
    if is_short and not fitting / 4 <= options.learning_rate <= fitting * 4:
        return options.learning_rate, f"--learning_rate {options.learning_rate:g}: preset 'short' learned best with {fitting:g}"
    return options.learning_rate, ""
