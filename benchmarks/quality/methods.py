"""What trains: each method as a model, an optimizer, and what follows its step. The same layers in every method.

The linear layers of the decoder train; embeddings, norms and the output layer are frozen, except where everything trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.methods import NEVER, NotInstalledError, target_linears
from benchmarks.quality.batches import Batch
from benchmarks.quality.columns import ColumnSteps
from benchmarks.quality.flat import FlatNoise
from benchmarks.quality.loss import answer_loss, autocast
from benchmarks.quality.one_level import config_of, flat
from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.formulas import subnet_size

BETAS = (0.9, 0.999)


@dataclass
class Trained:
    """A model that is ready to train.

    model: the causal language model, with the method in place; its parts are called as of the untouched one.
    plain: the trained values as a model without the method, for generation; the method's own model is used up.
    after_step: called after every optimizer step. details: of the method, for the record.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    plain: Callable[[], Any]
    after_step: Callable[[], Any] = lambda: None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains, for clipping."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@dataclass
class Start:
    """What a method is given to begin with.

    model: a fresh copy of the untouched model, the method's to change. untouched: makes another one.
    batches: what the run will train on, in order. rate, seed, steps, precision: of the run.
    """

    model: Any
    untouched: Callable[[], Any]
    batches: Sequence[Batch]
    rate: float
    seed: int
    steps: int
    precision: str = "bf16"


@dataclass(frozen=True)
class Method:
    """title: for tables. centre: learning rate in the middle of its search. build: makes it, with options.

    defaults: its options where nothing else is set. resolve: what options come to, with every default filled in.
    """

    title: str
    centre: float
    build: Callable[..., Trained]
    defaults: dict[str, Any] = field(default_factory=dict)
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The method's defaults with what was given instead."""
        return {**self.defaults, **given}


def full(start: Start, *, linears_only: bool = False) -> Trained:
    """Every weight trains, or every linear layer of the decoder."""
    model = start.model
    if linears_only:
        model.requires_grad_(False)
        for module in target_linears(model):
            module.weight.requires_grad_(True)
    return Trained(model, _adamw(model, start.rate), lambda: model)


def lora(start: Start, *, equal_to: float, rank: int | None = None, alpha: float | None = None, dora: bool = False) -> Trained:
    """PEFT's LoRA or DoRA. equal_to: share of the weights than which it trains no fewer parameters; rank: instead of that."""
    try:
        import peft
    except ImportError:
        raise NotInstalledError("peft is not installed: pip install 'losia_dist[benchmarks]'") from None
    rank = rank or equal_rank(start.model, equal_to, dora)
    alpha = 2 * rank if alpha is None else alpha
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(start.model, config)
    inner = adapted.get_base_model()
    return Trained(inner, _adamw(inner, start.rate), adapted.merge_and_unload, details={"rank": rank})


def equal_rank(model: Any, share: float, dora: bool = False) -> int:
    """Smallest rank of LoRA (DoRA) on the linear layers that trains no fewer parameters than subnets of this share."""
    shapes = [tuple(module.weight.shape) for module in target_linears(model)]
    budget = sum(m * subnet_size(n, share) for m, n in shapes)
    magnitudes = sum(m for m, _ in shapes) if dora else 0
    return max(1, math.ceil((budget - magnitudes) / sum(m + n for m, n in shapes)))


def galore(start: Start, *, rank: int = 128, gap: int = 200, scale: float = 0.25) -> Trained:
    """GaLore's AdamW: all linear layers train, with moments of their gradients' projection to `rank`."""
    try:
        from galore_torch import GaLoreAdamW
    except ImportError:
        raise NotInstalledError("galore-torch is not installed: pip install 'losia_dist[benchmarks]'") from None
    model = start.model.requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in target_linears(model)]
    group = {"params": weights, "rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=start.rate, betas=BETAS, weight_decay=0.0, no_deprecation_warning=True)
    return Trained(model, optimizer, lambda: model)


def losia(start: Start, *, eps: float = 1e-6, noise: float = 0.0, column_exponent: float = 0.0, **settings: Any) -> Trained:
    """This package, as a plain loop uses it. Settings are `LoSiAConfig`'s and the optimizer's eps.

    Of the benchmark alone: noise, the size of `FlatNoise`, and column_exponent, of `ColumnSteps`.
    """
    config = losia_config(settings, start.seed)
    model = get_losia_model(start.model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=start.rate), lr=start.rate, betas=BETAS, eps=eps)
    conductor = LoSiA(model, optimizer, config, total_steps=start.steps)
    if config.needs_calibration:
        chosen = [{"batch": batch} for batch in start.batches[: config.calibration_batches]]
        with autocast(start.precision):
            conductor.locate(chosen, lambda inner, given: answer_loss(inner, given["batch"]))
    if noise:
        FlatNoise(conductor, model, optimizer, noise, start.seed)
    if column_exponent:
        ColumnSteps(conductor, optimizer, column_exponent)

    def plain() -> Any:
        conductor.consolidate()
        values = model.state_dict()
        plain_model = start.untouched()
        plain_model.load_state_dict({name: values[name] for name in plain_model.state_dict()})
        return plain_model

    return Trained(model, optimizer, plain, conductor.step)


def losia_config(settings: dict[str, Any], seed: int) -> LoSiAConfig:
    """The configuration of a run."""
    return config_of({**settings, "seed": seed})


def _resolve_losia(options: dict[str, Any]) -> dict[str, Any]:
    own = {"eps": 1e-6, **{name: options[name] for name in ("eps", "noise", "column_exponent") if name in options}}
    settings = {name: value for name, value in options.items() if name not in own}
    return {**flat(losia_config(settings, seed=0)), **own}


def _adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)


# As the paper and its released code have it. T = 2: in a run of 60 steps every one of 30 layers is then located once, as
# often as in the paper's runs; its own T of 50 to 150 steps would move a single layer.
_PUBLISHED: dict[str, Any] = {
    "rank_factor": 0.125,
    "period": 2,
    "layers_per_slot": 1,
    "init": "random",
    "selection": "greedy",
    "importance": "param_mix",
    "importance_betas": [0.85, 0.85],
    "rewarm_steps": None,
    "reset_bias_correction": False,
}
# What this project recommends for a run of this length: the quickstart's configuration.
_RECOMMENDED = LoSiAConfig.preset("short")
_SHARE = _RECOMMENDED.row_factor * _RECOMMENDED.column_factor  # of each weight, that trains
_RANDOM: dict[str, Any] = {"rank_factor": 0.125, "init": "random", "period": NEVER}

METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", 1e-4, full),
    "full_linears": Method("full fine-tuning, linear layers only", 1e-4, full, {"linears_only": True}),
    "lora": Method("LoRA, equal parameters", 2e-3, lora, {"equal_to": _SHARE}),
    "dora": Method("DoRA, equal parameters", 2e-3, lora, {"dora": True, "equal_to": _SHARE}),
    "galore": Method("GaLore, rank 128", 2e-3, galore),
    "random": Method("random subnets, kept", 8e-3, losia, _RANDOM, _resolve_losia),
    "losia_published": Method("LoSiA as published, T = 2", 2e-3, losia, _PUBLISHED, _resolve_losia),
    "losia": Method("LoSiA, this project's defaults", 2e-3, losia, flat(_RECOMMENDED), _resolve_losia),
}
