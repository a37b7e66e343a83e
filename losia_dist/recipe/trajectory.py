"""How far a run has come, and what decides how it goes on: resumed with anything else, it would be another run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from losia_dist.errors import ConfigError

# name in the checkpoint -> what a user changes
_OPTIONS = {
    "template_date": "the date that the chat template writes (--template_date)",
    "learning_rate": "--learning_rate",
    "min_lr_ratio": "--min_lr_ratio",
    "weight_decay": "--weight_decay",
    "max_grad_norm": "--max_grad_norm",
    "seed": "--seed",
    "precision": "the precision (--precision)",
    "global_batch": "the examples per step (--micro_batch x --gradient_accumulation x ranks)",
    "examples_per_epoch": "the examples used in an epoch (those that fill --micro_batch on every rank)",
}
_SCHEDULE = {"steps": "the number of steps (--max_steps, --epochs)", "warmup_steps": "the warmup (--warmup_ratio)"}


@dataclass
class Progress:
    """How far a run has come, as counted by the training loop.

    Attributes:
        step: optimizer steps done.
        logged: the step of the last logged loss.
        loss_sum: of the steps since then, averaged over the ranks.
        seconds: spent in steps; elapsed: since the start, pauses between processes left out.
        tokens: over all ranks, padding included.
    """

    step: int = 0
    logged: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    elapsed: float = 0.0
    tokens: int = 0


def warmup_steps(options: argparse.Namespace, steps: int) -> int:
    """Optimizer steps with a rising learning rate."""
    return round(options.warmup_ratio * steps)


def describe(
    options: argparse.Namespace, precision: str, data: Mapping[str, Any], examples: int, steps: int, world_size: int
) -> dict[str, Any]:
    """Plain values that a run and the one that resumes it must share.

    Args:
        data: fingerprints of the data, as `RunData.fingerprint` gives them, and the date that the chat template writes.
        examples: in the training data.
    """
    at_once = options.micro_batch * world_size
    return {
        **data,
        "learning_rate": options.learning_rate,
        "min_lr_ratio": options.min_lr_ratio,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "seed": options.seed,
        "precision": precision,
        "global_batch": at_once * options.gradient_accumulation,
        "examples_per_epoch": examples // at_once * at_once,
        "steps": steps,
        "warmup_steps": warmup_steps(options, steps),
    }


def check_same(saved: Mapping[str, Any], here: Mapping[str, Any], step: int, path: str) -> None:
    """Refuse to resume after `step` steps with what would make it another run. Each rank by itself.

    The number of ranks, --micro_batch and --gradient_accumulation may differ where the examples of every step stay the same.
    The number of steps may differ where the learning rate of no remaining step depends on it: --min_lr_ratio 1, after both
    warmups, and not less than are done.

    Raises:
        ConfigError: the first difference, with both values and the fix.
    """
    constant = here["min_lr_ratio"] == 1 and max(saved["warmup_steps"], here["warmup_steps"]) <= step <= here["steps"]
    for name in [*saved, *(name for name in here if name not in saved)]:
        there, ours = saved.get(name), here.get(name)
        if there == ours or (name in _SCHEDULE and constant):
            continue
        what = _OPTIONS.get(name) or _SCHEDULE.get(name) or f"the {name}"
        why = ""
        if name in _SCHEDULE:
            why = " (the learning rate follows it; only --min_lr_ratio 1, after the warmup, can go on for longer)"
        raise ConfigError(
            f"--resume: {what} was {_shown(there)} in the run that saved {path}, and is {_shown(ours)} now{why}: set it as it "
            "was, or start a new run with another --output_dir."
        )


def _shown(value: Any) -> str:
    return "not there" if value is None else str(value)
