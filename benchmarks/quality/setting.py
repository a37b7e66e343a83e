"""`Setting`: everything that decides the numbers of one run, in plain values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One fine-tuning run. Two runs with equal settings give equal numbers on one machine.

    Args:
        task: name of the data (`tasks.load_task`).
        method: name of what trains (`methods.METHODS`).
        rate: peak learning rate.
        seed: of the order of the data, of first adapters and of first subnets.
        steps: optimizer steps.
        batch: problems a step; None: the task's own number.
        options: settings of the method beside its own defaults.
        scored: held-out problems that are answered and scored.
        model: directory of the model, as it was named.
        precision: of the arithmetic, one of `loss.PRECISIONS`.
        resolved: what the method's options came to, every default included, so that a changed default is another setting.
    """

    task: str
    method: str
    rate: float
    seed: int
    steps: int = 60
    batch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    scored: int = 0
    model: str = "quickstart/model"
    precision: str = "bf16"
    resolved: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for equal settings, however they were asked for: options that only repeat a default change nothing."""
        return json.dumps({**asdict(self), "options": None}, sort_keys=True)

    @property
    def label(self) -> str:
        """Name of the method with the options that were set, for tables."""
        options = ", ".join(f"{name}={_short(value)}" for name, value in sorted(self.options.items()))
        return f"{self.method} ({options})" if options else self.method

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `Setting(**values)` takes them back."""
        return asdict(self)

    def at(self, rate: float | None = None, seed: int | None = None) -> Setting:
        """The same run at another learning rate or seed."""
        return replace(self, rate=self.rate if rate is None else rate, seed=self.seed if seed is None else seed)


def parse_options(given: list[str]) -> dict[str, dict[str, Any]]:
    """`["losia.rank_factor=0.25", ...]` as {"losia": {"rank_factor": 0.25}}; values are JSON, or else text.

    Raises:
        SystemExit: no method, no option or no value.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, option = name.partition(".")
        if not (equals and dot and method and option):
            raise SystemExit(f"--set {text}: give METHOD.OPTION=VALUE, for example losia.rank_factor=0.25")
        try:
            parsed: Any = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        options.setdefault(method, {})[option] = parsed
    return options


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(_short(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
