"""What users set: `LoSiAConfig`, a dataclass in the habits of PEFT's configurations."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from losia_dist.config_file import read_settings
from losia_dist.errors import ConfigError
from losia_dist.removed import refuse_removed_settings, without_kept

CONFIG_NAME = "losia_config.json"
IMPORTANCES = ("param_mix", "first_order", "second_order")

# Values that the fields' meaning foresees but that this version does not build yet: refused by name, never ignored.
_AVAILABLE = {
    "selection": ("greedy", "random"),
    "init": ("random", "importance"),
    "localization": ("reduced", "rank_parallel"),
    "importance": IMPORTANCES,
}


@dataclass
class LoSiAConfig:
    """Settings of LoSiA (Wang, Qi, Xu: arXiv 2507.04487). Same on every rank; checked before training starts.

    Args:
        rank_factor: share p of a target layer's rows and of its columns that train, in (0, 1]; a pair (rows, columns)
            sets the two apart. Default 1/8 (paper, section 4.1): 1/64 of each weight. A factor of 1 takes all.
        rank_pattern: module name -> rank factor (or pair) of its own, by name as in target_modules: {"down_proj": [1, 0.03125],
            "layers.0.self_attn.q_proj": 0.25}. The longest name that matches counts. None: rank_factor for all.
        output_rank_factor: share p_o of the output layer's rows (all of its columns) that train, in (0, 1]. None, the
            default, leaves the output layer frozen. Paper: 1/8 for instruction tuning.
        period: T, optimizer steps in a time slot (one slot re-localizes `layers_per_slot` groups). At least 1.
            Default 100; paper: 50 to 150.
        target_modules: which linear layers (`nn.Linear`, Transformers' `Conv1D`) get a subnet: "all-linear" (the language
            model's, but the output layer, what modules_to_save names and layers without a gradient), a list of names that
            match a module's full name or its end ("q_proj", "mlp.down_proj"), or a regular expression over full names.
        modules_to_save: further modules trained in full, by name as above ("norm", "embed_tokens"). None: none.
        train_norms: train every normalization layer in full.
        train_embeddings: train the input embedding in full.
        full_lr_scale: learning rate of all that trains in full (the three above), as a multiple of the subnets'. Above 0.
            Subnets take larger rates than whole parameters do: random ones about eight times as large (docs/quality.md).
        importance: I of one weight element w with gradient g: "param_mix" |wg - (wg)^2 / 2| (paper, eq. 3),
            "first_order" |wg|, "second_order" (wg)^2.
        importance_betas: (b1, b2) of the averages of I and of its deviation, b1 in (0, 1), b2 in [0, 1). Paper: 0.85, 0.85.
        selection: "greedy", the best of the paper's candidates (algorithm 1). "random": drawn anew, by seed, layer and step: no
            importance is collected, nothing is sent for it, and a slot costs no more than other steps.
        outlier_limit: with selection="random": input neurons whose root mean square over calibration batches (`LoSiA.locate`,
            as for init="importance", by forward passes alone) is above this multiple of their layer's median are never
            drawn. Above 1. None: all may be drawn, and no batch is needed.
        layers_per_slot: groups (decoder layers) that localize in one slot. At least 1. "auto": as few as locate every group
            `cycles` times in the length of the run, which `LoSiA(..., total_steps=...)` is told.
        cycles: with layers_per_slot="auto", how often every group is located after the start. At least 1.
        init: first subnets: "random" (seeded, the paper's), or "importance": located before the first step by
            `LoSiA.locate` from calibration batches (Trainer and training script take them from the training data).
        calibration_batches: micro-batches of each rank for `LoSiA.locate`, where an integration takes them. At least 1.
        rewarm_steps: steps over which a re-localized group's learning rate rises again; None: the period; 0: off.
        reset_bias_correction: when a layer's subnet moves, restart Adam's bias correction with its moments (correct, default);
            False keeps the old step count, as the authors' code does.
        localization: "reduced": importance comes from the gradient of the global batch, reduce-scattered by rows.
            "rank_parallel": each rank localizes other groups (`layers_per_slot` of them) from its own batches, with no
            gradient communicated: N ranks re-localize N times as many groups per slot at the same cost per rank.
        seed: of random subnets. The first ones depend on the seed and the layer's name alone, later ones on the step too.
    """

    rank_factor: float | tuple[float, float] = 0.125
    rank_pattern: dict[str, float | tuple[float, float]] | None = None
    output_rank_factor: float | None = None
    period: int = 100
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    train_norms: bool = False
    train_embeddings: bool = False
    full_lr_scale: float = 1.0
    importance: str = "param_mix"
    importance_betas: tuple[float, float] = (0.85, 0.85)
    selection: str = "greedy"
    outlier_limit: float | None = None
    layers_per_slot: int | str = 1
    cycles: int = 1
    init: str = "random"
    calibration_batches: int = 8
    rewarm_steps: int | None = None
    reset_bias_correction: bool = True
    localization: str = "reduced"
    seed: int = 0

    def __post_init__(self) -> None:
        self.rank_factor = _factors("rank_factor", self.rank_factor)
        self._check_pattern()
        if self.output_rank_factor is not None:
            _check_share("output_rank_factor", self.output_rank_factor)
        _check_count("period", self.period, minimum=1)
        if self.layers_per_slot != "auto":
            _check_count("layers_per_slot", self.layers_per_slot, minimum=1, also="auto")
        _check_count("cycles", self.cycles, minimum=1)
        _check_count("calibration_batches", self.calibration_batches, minimum=1)
        if self.rewarm_steps is not None:
            _check_count("rewarm_steps", self.rewarm_steps, minimum=0)
        _check_count("seed", self.seed, minimum=0)
        self._check_targets()
        betas = self.importance_betas
        if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
            raise ConfigError(f"importance_betas={betas!r}: two numbers in [0, 1) are needed, for example (0.85, 0.85).")
        if betas[0] == 0:
            raise ConfigError(
                f"importance_betas={betas!r}: with a first number of 0 no importance ever differs from its average, and every "
                "score would be 0: give one above 0, for example 0.85."
            )
        self.importance_betas = (float(betas[0]), float(betas[1]))
        refuse_removed_settings({"selection": self.selection})
        for name, available in _AVAILABLE.items():
            value = getattr(self, name)
            if value not in available:
                raise ConfigError(
                    f"{name}={value!r} is not available in this version; available: {', '.join(map(repr, available))}."
                )
        for name in ("train_norms", "train_embeddings", "reset_bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: true or false is needed.")
        self._check_full_lr_scale()
        self._check_outlier_limit()
        if not self.collects_importance:
            self._refuse_importance()

    def _check_full_lr_scale(self) -> None:
        scale = self.full_lr_scale
        if not _is_number(scale) or not 0 < scale < float("inf"):
            raise ConfigError(
                f"full_lr_scale={scale!r}: a number above 0 is needed; to freeze norms, embeddings and modules_to_save leave "
                "them out."
            )
        if scale != 1 and not (self.modules_to_save or self.train_norms or self.train_embeddings):
            raise ConfigError(
                f"full_lr_scale={scale!r}, but nothing trains in full: set train_norms, train_embeddings or modules_to_save, "
                "or leave full_lr_scale out."
            )

    def _check_outlier_limit(self) -> None:
        limit = self.outlier_limit
        if limit is None:
            return
        if not _is_number(limit) or not 1 < limit < float("inf"):
            raise ConfigError(f"outlier_limit={limit!r}: a number above 1 is needed, for example 4, or null to draw from all.")
        if self.collects_importance:
            raise ConfigError(
                f"outlier_limit={limit!r} is for subnets that are drawn, and selection={self.selection!r} chooses them by "
                "importance: set selection='random', or leave outlier_limit out."
            )
        if self.column_factor == 1 and all(_pair(factor)[1] == 1 for factor in (self.rank_pattern or {}).values()):
            raise ConfigError(
                f"outlier_limit={limit!r}, but subnets take all columns: leave it out, or lower rank_factor's second number."
            )

    def _refuse_importance(self) -> None:
        """Nothing collects importance: what would ask for it, or change it, must be as it is by default."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("init", "localization", "importance", "importance_betas"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no meaning with selection='random', which draws subnets and collects "
                    f"no importance: leave {name} out, or take selection='greedy'."
                )

    def _check_targets(self) -> None:
        targets = self.target_modules
        if isinstance(targets, tuple | set):
            targets = self.target_modules = sorted(targets)
        names_ok = isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets)
        if not names_ok and not (isinstance(targets, str) and targets):
            raise ConfigError(
                f"target_modules={targets!r}: give 'all-linear', a non-empty list of module names, or a regular expression."
            )
        saved = self.modules_to_save
        if isinstance(saved, str) or (saved is not None and not all(isinstance(s, str) for s in saved)):
            raise ConfigError(f"modules_to_save={saved!r}: give a list of module names, for example ['norm'], or null.")
        if saved is not None:
            self.modules_to_save = list(saved)

    def _check_pattern(self) -> None:
        pattern = self.rank_pattern
        if pattern is None:
            return
        if not isinstance(pattern, dict) or not pattern or not all(isinstance(name, str) and name for name in pattern):
            raise ConfigError(f"rank_pattern={pattern!r}: give names with their factors, {{'down_proj': 0.25}}, or null.")
        self.rank_pattern = {name: _factors(f"rank_pattern[{name!r}]", factor) for name, factor in pattern.items()}

    @property
    def collects_importance(self) -> bool:
        """Whether subnets are chosen by importance, and not drawn."""
        return self.selection != "random"

    @property
    def needs_calibration(self) -> bool:
        """Whether `LoSiA.locate` must see calibration batches before the first step."""
        return self.init == "importance" or self.outlier_limit is not None

    @property
    def row_factor(self) -> float:
        """Share of the rows (output neurons) of a target layer that train, unless rank_pattern names it."""
        return _pair(self.rank_factor)[0]

    @property
    def column_factor(self) -> float:
        """Share of the columns (input neurons) of a target layer that train, unless rank_pattern names it."""
        return _pair(self.rank_factor)[1]

    def factors_of(self, module: str) -> tuple[float, float]:
        """Shares of rows and columns of the target layer of this full name."""
        named = self.rank_pattern or {}
        matching = [name for name in named if matches(name, module)]
        return _pair(named[max(matching, key=len)] if matching else self.rank_factor)

    @property
    def effective_rewarm_steps(self) -> int:
        """Rewarming length in optimizer steps, with None resolved to the period; 0 is off."""
        return self.period if self.rewarm_steps is None else self.rewarm_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (JSON, YAML); `LoSiAConfig.from_dict` takes it back."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "LoSiAConfig") -> LoSiAConfig:
        """Build from plain values; an unknown name is an error that gives the nearest known ones.

        Settings of an earlier version pass where they ask for what was kept.
        """
        refuse_removed_settings(values, source)
        values, known = without_kept(values), [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
                hint = f" Did you mean {' or '.join(nearest)}?" if nearest else f" Known: {', '.join(known)}."
                raise ConfigError(f"{source}: unknown option {name!r}.{hint}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> LoSiAConfig:
        """Read a YAML or JSON file that holds the fields above and nothing else."""
        path = Path(path)
        values = read_settings(path, "LoSiA configuration")
        return cls.from_dict(values, source=str(path))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `losia_config.json` into the directory (made if missing)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LoSiAConfig:
        """Read what `save_pretrained` wrote."""
        return cls.from_file(Path(directory) / CONFIG_NAME)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def matches(name: str, module: str) -> bool:
    """Whether a name in rank_pattern means the module of this full name: all of it, or its last parts."""
    return module == name or module.endswith(f".{name}")


def _factors(name: str, value: Any) -> float | tuple[float, float]:
    """A rank factor, or a pair of them, checked."""
    if not isinstance(value, list | tuple):
        _check_share(name, value)
        return value  # type: ignore[no-any-return]
    if len(value) != 2:
        raise ConfigError(f"{name}={value!r}: give one number, or a pair (rows, columns) such as (0.25, 0.0625).")
    for part, factor in zip(("rows", "columns"), value, strict=True):
        _check_share(f"{name} ({part})", factor)
    return (value[0], value[1])


def _pair(factor: float | tuple[float, float]) -> tuple[float, float]:
    return factor if isinstance(factor, tuple) else (factor, factor)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_share(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}: a share in (0, 1] is needed; 0.125 (one eighth) is the paper's.")


def _check_count(name: str, value: Any, minimum: int, also: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(
            f"{name}={value!r}: a whole number of at least {minimum} is needed{f', or {also!r}' if also else ''}."
        )
