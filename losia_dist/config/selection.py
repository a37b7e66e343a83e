"""How subnets are chosen: `Located` by gradient importance, or `Drawn` at random. The value of `LoSiAConfig.selection`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from losia_dist.errors import ConfigError

IMPORTANCES = ("param_mix", "first_order", "second_order")
STARTS = ("random", "importance")
REDUCTIONS = ("all", "by_rank")


@dataclass(frozen=True)
class Located:
    """Subnets where importance is largest: the best of the paper's candidates (algorithm 1), group by group as slots end.

    Args:
        importance: I of one weight element w with gradient g: "param_mix" |wg - (wg)^2 / 2| (paper, eq. 3),
            "first_order" |wg|, "second_order" (wg)^2.
        betas: (b1, b2) of the averages of I and of its deviation, b1 in (0, 1), b2 in [0, 1). Paper: 0.85, 0.85.
        start: first subnets: "random" (seeded, the paper's), or "importance": located before the first step by
            `LoSiA.locate` from calibration batches (Trainer and training script take them from the training data).
        calibration_batches: micro-batches of each rank for `LoSiA.locate`, where an integration takes them. At least 1.
        reduction: "all": importance comes from the gradient of the global batch, reduce-scattered by rows. "by_rank": each
            rank localizes other groups (`layers_per_slot` of them) from its own batches, with no gradient communicated: N
            ranks re-localize N times as many groups per slot at the same cost per rank.
        importance_steps: optimizer steps of a slot that importance is taken from, spread evenly, its last one included; the
            others form no full gradient and cost no more than with drawn subnets. At least 1, at most the period. None: all
            steps, as in the paper.
        share_columns: linear layers of one module that read the same input, as the first forward pass shows (q, k and v; gate
            and up), are located together, on one set of columns, by their summed score: they gather x[..., C] once and keep it
            once for backward. False, as in the paper: each layer has columns of its own.
    """

    importance: str = "param_mix"
    betas: tuple[float, float] = (0.85, 0.85)
    start: str = "random"
    calibration_batches: int = 8
    reduction: str = "all"
    importance_steps: int | None = None
    share_columns: bool = False

    def __post_init__(self) -> None:
        for name, available in (("importance", IMPORTANCES), ("start", STARTS), ("reduction", REDUCTIONS)):
            value = getattr(self, name)
            if value not in available:
                raise ConfigError(
                    f"selection: located: {name}={value!r} is not available in this version; available: "
                    f"{', '.join(map(repr, available))}."
                )
        betas = self.betas
        if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
            raise ConfigError(f"selection: located: betas={betas!r}: two numbers in [0, 1) are needed, such as (0.85, 0.85).")
        if betas[0] == 0:
            raise ConfigError(
                f"selection: located: betas={betas!r}: with a first number of 0 no importance ever differs from its average, "
                "and every score would be 0: give one above 0, for example 0.85."
            )
        object.__setattr__(self, "betas", (float(betas[0]), float(betas[1])))
        check_count("selection: located: calibration_batches", self.calibration_batches, minimum=1)
        if self.importance_steps is not None:
            check_count("selection: located: importance_steps", self.importance_steps, minimum=1)
        _check_truth("selection: located: share_columns", self.share_columns)


@dataclass(frozen=True)
class Drawn:
    """Subnets drawn anew by seed, layer and step: no importance is collected, nothing is sent for it, and a slot costs no more
    than other steps.

    Args:
        outlier_limit: input neurons whose root mean square over calibration batches (`LoSiA.locate`, forward passes alone) is
            above this multiple of their layer's median are never drawn. Above 1. None: all may be drawn, no batch is needed.
        calibration_batches: micro-batches of each rank for `LoSiA.locate`, where an integration takes them. At least 1.
        share_columns: linear layers of one module whose inputs are of one width (q, k and v; gate and up) draw the same
            columns: where they read the same input, they gather x[..., C] once and keep it once for backward. False: each layer
            draws its own.
    """

    outlier_limit: float | None = None
    calibration_batches: int = 8
    share_columns: bool = True

    def __post_init__(self) -> None:
        limit = self.outlier_limit
        if limit is not None and (not is_number(limit) or not 1 < limit < float("inf")):
            raise ConfigError(f"outlier_limit={limit!r}: a number above 1 is needed, for example 4, or null to draw from all.")
        check_count("selection: drawn: calibration_batches", self.calibration_batches, minimum=1)
        _check_truth("selection: drawn: share_columns", self.share_columns)


Selection = Located | Drawn
KINDS: dict[str, type[Located] | type[Drawn]] = {"located": Located, "drawn": Drawn}
SHORT_FORMS: dict[str, type[Located] | type[Drawn]] = {"greedy": Located, "random": Drawn}


def read_selection(value: Any) -> Selection:
    """A selection from itself, a short form, or plain values: {"located": {...}} or {"drawn": {...}}. Raises: ConfigError."""
    if isinstance(value, Located | Drawn):
        return value
    if isinstance(value, str) and value in SHORT_FORMS | KINDS:
        return (SHORT_FORMS | KINDS)[value]()
    if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in KINDS:
        (kind, options), *_ = value.items()
        return _read(KINDS[kind], kind, options or {})
    raise ConfigError(
        f"selection={value!r} is not available in this version; give Located(...), Drawn(...), 'greedy' (Located()) or "
        "'random' (Drawn()), in a file 'located: {...}' or 'drawn: {...}' under selection."
    )


def plain_selection(selection: Selection) -> dict[str, Any]:
    """Plain values (JSON, YAML) that `read_selection` takes back."""
    kind = next(name for name, cls in KINDS.items() if isinstance(selection, cls))
    return {kind: {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(selection).items()}}


def _read(cls: type[Located] | type[Drawn], kind: str, options: Any) -> Selection:
    if not isinstance(options, Mapping):
        raise ConfigError(f"selection: {kind}: {options!r}: 'name: value' lines are needed.")
    check_known(options, [field.name for field in fields(cls)], f"selection: {kind}")
    return cls(**options)


def check_known(names: Iterable[Any], known: Sequence[str], where: str) -> None:
    """Raises: ConfigError for a name that is not known, with the nearest ones."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
            hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"Known: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown option {name!r}. {hint}")


def _check_truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: true or false is needed.")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_count(name: str, value: Any, minimum: int, also: str = "") -> None:
    """Raises: ConfigError unless it is a whole number of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(
            f"{name}={value!r}: a whole number of at least {minimum} is needed{f', or {also!r}' if also else ''}."
        )
