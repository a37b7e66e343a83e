"""The measured curves of a run, under one name each, whichever log they came from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Names in metrics.jsonl and its TensorBoard, and in the Trainer's log_history and its TensorBoard, where both have prefixes.
_CURVES = {
    "loss": "loss",
    "lr": "rate",
    "learning_rate": "rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "train_tokens_per_second": "tokens_per_second",
    "peak_memory_gb": "memory",
    "losia/peak_memory_gb": "memory",
}
_RATE_OF_GROUP = re.compile(r"(?:losia/learning_rate|learning_rates)/(.+)")
_HELD_OUT = re.compile(r"eval[_/](?:(.+)_)?loss")


@dataclass
class Curve:
    """Values at optimizer steps; the last one said of a step counts."""

    points: dict[int, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.points)

    @property
    def steps(self) -> list[int]:
        """In ascending order."""
        return sorted(self.points)

    @property
    def values(self) -> list[float]:
        """In the order of the steps."""
        return [self.points[step] for step in self.steps]

    @property
    def last(self) -> float:
        """At the latest step."""
        return self.points[max(self.points)]


@dataclass
class Curves:
    """Curves of a run, each over optimizer steps; empty ones were not logged.

    loss: of training, nats a token. held_out: by the data set's name, "held-out" where there is one. rate: scheduled learning
    rate. rates: by group, rewarming included. memory: peak, 10^9 bytes.
    """

    loss: Curve = field(default_factory=Curve)
    rate: Curve = field(default_factory=Curve)
    grad_norm: Curve = field(default_factory=Curve)
    tokens_per_second: Curve = field(default_factory=Curve)
    memory: Curve = field(default_factory=Curve)
    held_out: dict[str, Curve] = field(default_factory=dict)
    rates: dict[str, Curve] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(curve for _, curve in self.named())

    def named(self) -> Iterator[tuple[str, Curve]]:
        """Every curve that has a point, with a name for people."""
        for name in ("loss", "rate", "grad_norm", "tokens_per_second", "memory"):
            if getattr(self, name):
                yield name, getattr(self, name)
        yield from self.held_out.items()
        yield from self.rates.items()

    def add(self, name: str, step: int, value: object) -> None:
        """Take in a logged value; what is not a number, or no curve of a report, is passed over."""
        if isinstance(value, bool) or not isinstance(value, int | float) or step < 0:
            return
        name = name.removeprefix("train/")
        if name in _CURVES:
            getattr(self, _CURVES[name]).points[step] = float(value)
        elif name == "held_out":
            self.held_out.setdefault("held-out", Curve()).points[step] = float(value)
        elif found := _HELD_OUT.fullmatch(name):
            self.held_out.setdefault(found.group(1) or "held-out", Curve()).points[step] = float(value)
        elif found := _RATE_OF_GROUP.fullmatch(name):
            self.rates.setdefault(found.group(1), Curve()).points[step] = float(value)

    def first_bad_step(self) -> int | None:
        """The first step whose training loss is not finite."""
        return next((step for step in self.loss.steps if not math.isfinite(self.loss.points[step])), None)
