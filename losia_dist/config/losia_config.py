"""What users set: `LoSiAConfig`, a dataclass in the habits of PEFT's configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from losia_dist.config.older_form import nested, refuse_flat
from losia_dist.config.reading import parse_settings, read_settings
from losia_dist.config.removed import refuse_removed_settings, without_kept
from losia_dist.config.selection import (
    Drawn,
    Located,
    Selection,
    check_count,
    check_known,
    is_number,
    plain_selection,
    read_selection,
)
from losia_dist.errors import ConfigError

CONFIG_NAME = "losia_config.json"
PRODUCTS = ("fp8",)
RETIRED = ("nf4", "int8", "bf16", "fp32", "stochastic")
PACKAGED = resources.files("losia_dist") / "config" / "presets"  # files that go by their names


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
        target_modules: which linear layers (`nn.Linear`, Transformers' `Conv1D`) and experts get a subnet: "all-linear" (the
            language model's, but the output layer, what modules_to_save names, routers and layers without a gradient), a list
            of names that match a full name or its end ("q_proj", "mlp.down_proj"), or a regular expression over full names.
            Fused expert weights go by the parameter's name ("experts.gate_up_proj").
        modules_to_save: further modules trained in full, by name as above ("norm", "embed_tokens"). None: none.
        train_norms: train every normalization layer in full.
        train_embeddings: train the input embedding in full.
        full_lr_scale: learning rate of all that trains in full (the three above), as a multiple of the subnets'. Above 0.
            Subnets take larger rates than whole parameters do: random ones about eight times as large (docs/quality.md).
        selection: how subnets are chosen: `Located(...)`, by gradient importance, or `Drawn(...)`, at random. "greedy" is short
            for Located(), "random" for Drawn().
        layers_per_slot: groups (decoder layers) that localize in one slot. At least 1. "auto": as few as locate every group
            `cycles` times in the length of the run, which `LoSiA(..., total_steps=...)` is told.
        cycles: with layers_per_slot="auto", how often every group is located after the start. At least 1.
        experts_per_slot: experts of one layer that localize together, where a model has experts in fused weights (their
            averages, and the full gradient of one layer's, are what costs memory). At least 1. "auto": as many as keep that
            gradient within 2^29 numbers (1 GiB in bf16). Drawn subnets need no such parts, nor do experts that expert
            parallelism spreads over ranks. It decides what the subnets' parameters are called and hold, and stays for the whole
            run.
        router_lr_scale: train the routers of experts in full, at this multiple of the subnets' learning rate. Above 0; small,
            such as 0.01. None, the default, leaves them frozen.
        rewarm_steps: steps over which a re-localized group's learning rate rises again; None: the period; 0: off.
        reset_bias_correction: when a layer's subnet moves, restart Adam's bias correction with its moments (correct, default);
            False keeps the old step count, as the authors' code does.
        retired: over a quantized base, how what a subnet changed is kept once it has moved on, beside the codes: "nf4" (0.53
            bytes a value), "int8" (1), "bf16" (2) or "fp32" (4); "stochastic" rounds it into the codes at random, which takes
            no memory and adds noise with each move. None: "nf4" over bitsandbytes' forms, "int8" over FP8.
        weight_products: "fp8": linear layers compute y = x W^T and dx = dy W in FP8, for which NVIDIA GPUs have units from
            compute capability 8.9 on; gradients of subnets and weights stay as they are. None, the default: in the dtype of x.
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
    selection: Selection | str = field(default_factory=Located)
    layers_per_slot: int | str = 1
    cycles: int = 1
    experts_per_slot: int | str = "auto"
    router_lr_scale: float | None = None
    rewarm_steps: int | None = None
    reset_bias_correction: bool = True
    retired: str | None = None
    weight_products: str | None = None
    seed: int = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> LoSiAConfig:
        refuse_flat(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.rank_factor = _factors("rank_factor", self.rank_factor)
        self._check_pattern()
        if self.output_rank_factor is not None:
            _check_share("output_rank_factor", self.output_rank_factor)
        check_count("period", self.period, minimum=1)
        if self.layers_per_slot != "auto":
            check_count("layers_per_slot", self.layers_per_slot, minimum=1, also="auto")
        check_count("cycles", self.cycles, minimum=1)
        if self.experts_per_slot != "auto":
            check_count("experts_per_slot", self.experts_per_slot, minimum=1, also="auto")
        if self.rewarm_steps is not None:
            check_count("rewarm_steps", self.rewarm_steps, minimum=0)
        check_count("seed", self.seed, minimum=0)
        self._check_targets()
        refuse_removed_settings({"selection": self.selection})
        self.selection = read_selection(self.selection)
        for name in ("train_norms", "train_embeddings", "reset_bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: true or false is needed.")
        if self.retired is not None and self.retired not in RETIRED:
            raise ConfigError(f"retired={self.retired!r}: {', '.join(RETIRED)}, or null.")
        if self.weight_products is not None and self.weight_products not in PRODUCTS:
            raise ConfigError(f"weight_products={self.weight_products!r}: {', '.join(PRODUCTS)}, or null.")
        self._check_importance_steps()
        self._check_full_lr_scale()
        self._check_experts()
        self._check_outlier_limit()

    def _check_importance_steps(self) -> None:
        steps = None if self.located is None else self.located.importance_steps
        if steps is not None and steps > self.period:
            raise ConfigError(
                f"selection: located: importance_steps={steps!r}: at most the period, {self.period}, or null for all steps."
            )

    def _check_full_lr_scale(self) -> None:
        scale = self.full_lr_scale
        _check_above_0("full_lr_scale", scale, "; to freeze norms, embeddings and modules_to_save leave them out")
        if scale != 1 and not (self.modules_to_save or self.train_norms or self.train_embeddings):
            raise ConfigError(
                f"full_lr_scale={scale!r}, but nothing trains in full: set train_norms, train_embeddings or modules_to_save, "
                "or leave full_lr_scale out."
            )

    def _check_experts(self) -> None:
        if self.router_lr_scale is not None:
            _check_above_0("router_lr_scale", self.router_lr_scale, ", or null to leave routers frozen")
        if self.experts_per_slot != "auto" and self.located is None:
            raise ConfigError(
                f"experts_per_slot={self.experts_per_slot!r}, but drawn subnets localize nothing, so experts need no "
                "parts: leave it out."
            )

    def _check_outlier_limit(self) -> None:
        columns = [self.column_factor, *(_pair(factor)[1] for factor in (self.rank_pattern or {}).values())]
        if self.outlier_limit is not None and all(factor == 1 for factor in columns):
            raise ConfigError(
                f"outlier_limit={self.outlier_limit!r}, but subnets take all columns: leave it out, or lower rank_factor's "
                "second number."
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
    def located(self) -> Located | None:
        """How subnets are located; None where they are drawn, and nothing collects importance."""
        return self.selection if isinstance(self.selection, Located) else None

    @property
    def outlier_limit(self) -> float | None:
        """That of `Drawn`; None where there is none."""
        return self.selection.outlier_limit if isinstance(self.selection, Drawn) else None

    @property
    def share_columns(self) -> bool:
        """Whether linear layers with one input have the same columns."""
        return read_selection(self.selection).share_columns

    @property
    def by_rank(self) -> bool:
        """Whether each rank localizes groups of its own."""
        return self.located is not None and self.located.reduction == "by_rank"

    @property
    def needs_calibration(self) -> bool:
        """Whether `LoSiA.locate` must see calibration batches before the first step."""
        return self.outlier_limit is not None if self.located is None else self.located.start == "importance"

    @property
    def calibration_batches(self) -> int:
        """Micro-batches of each rank for `LoSiA.locate`, where an integration takes them."""
        return read_selection(self.selection).calibration_batches

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
        values = {one.name: _plain(getattr(self, one.name)) for one in fields(self)}
        return {**values, "selection": plain_selection(read_selection(self.selection))}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "LoSiAConfig") -> LoSiAConfig:
        """Build from plain values; an unknown name is an error that gives the nearest known ones.

        Settings of an earlier version pass where they ask for what was kept, with one warning that names the line of now.
        """
        refuse_removed_settings(values, source)
        values = nested(without_kept(values), source)
        check_known(values, [one.name for one in fields(cls)], source)
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> LoSiAConfig:
        """A packaged configuration: "published" (the paper's), "short" (for runs of less than two cycles of that), one for a
        size of model ("7b", "13b", "70b", "qwen3-30b-a3b", "gpt-oss-20b") or of a recipe ("alpaca-pro", "commonsense").

        Raises: ConfigError.
        """
        if not (PACKAGED / f"{name}.yaml").is_file():
            names = sorted(file.name.removesuffix(".yaml") for file in PACKAGED.iterdir() if file.name.endswith(".yaml"))
            raise ConfigError(f"there is no preset {name!r}; there are {', '.join(names)}.")
        return cls.from_file(str(PACKAGED / f"{name}.yaml"))

    @classmethod
    def read(cls, name: str | Path) -> LoSiAConfig:
        """By a preset's name, a file's path, or the settings themselves as JSON ("{...}"), as --losia_config takes it.

        Raises: ConfigError.
        """
        if str(name).lstrip().startswith("{"):
            return cls.from_dict(parse_settings(str(name), "LoSiA configuration"), source="losia_config")
        is_preset = Path(name).name == str(name) and (PACKAGED / f"{name}.yaml").is_file() and not Path(name).exists()
        return cls.preset(str(name)) if is_preset else cls.from_file(name)

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


def _check_above_0(name: str, value: Any, otherwise: str) -> None:
    if not is_number(value) or not 0 < value < float("inf"):
        raise ConfigError(f"{name}={value!r}: a number above 0 is needed{otherwise}.")


def _check_share(name: str, value: Any) -> None:
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}: a share in (0, 1] is needed; 0.125 (one eighth) is the paper's.")
