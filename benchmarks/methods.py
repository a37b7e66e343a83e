"""The training methods that the benchmarks compare, each as one step function over the same kind of model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import Shape
from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups

RANK_FACTOR = 0.125
COLUMNS = (1.0, 1 / 64)  # the same number of weights as 1/8 x 1/8: all rows of a few columns
NEVER = 1_000_000_000  # a period that no measurement reaches the end of


class NotInstalledError(RuntimeError):
    """A baseline's package is missing."""


@dataclass
class Method:
    """A prepared run: `step(tokens)` does forward, backward, optimizer and whatever else the method needs.

    A step returns True if it ended a time slot, and so re-localized a layer.
    """

    name: str
    model: nn.Module
    step: Callable[[Tensor], Any]
    optimizer: Any = None
    losia: LoSiA | None = None


def floor(shape: Shape) -> Method:
    """Frozen model, forward and the gradient of every layer's input: what no method that trains inside all layers can avoid."""
    model = shape.model().requires_grad_(False)
    model.enable_input_require_grads()

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return Method("floor (forward and dx)", model, step)


def matmuls(shape: Shape) -> Method:
    """The floor's matrix products in target linears alone, y = x W^T and dx = dy W: the part of the floor that dW can match."""
    model = shape.model().requires_grad_(False)
    weights = [module.weight for module in target_linears(model)]
    dtype, device = weights[0].dtype, weights[0].device
    sizes = {size for weight in weights for size in weight.shape}
    inputs = {size: torch.randn(shape.batch * shape.length, size, dtype=dtype, device=device) for size in sizes}

    def step(tokens: Tensor) -> None:
        for weight in weights:
            nn.functional.linear(inputs[weight.shape[1]], weight)
            inputs[weight.shape[0]] @ weight

    return Method("matmuls of the target linears alone", model, torch.no_grad()(step))


def full(shape: Shape) -> Method:
    """Every linear layer of the decoder trains in full; torch's AdamW with its states in the weights' own dtype."""
    model = shape.model().requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in target_linears(model)]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=shape.device != "cpu")
    return Method("full fine-tuning, AdamW", model, plain_step(model, optimizer), optimizer)


def full_master(shape: Shape) -> Method:
    """As `full`, with fp32 master values and fp32 moments, as engines keep them for bf16 weights."""
    model = shape.model().requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in target_linears(model)]
    optimizer = LoSiAAdamW(weights, lr=1e-5)
    return Method("full fine-tuning, fp32 master", model, plain_step(model, optimizer), optimizer)


def lora(shape: Shape, rank: int, *, name: str = "LoRA", autocast: bool = True, **settings: Any) -> Method:
    """PEFT's LoRA on the same layers. `autocast`: PEFT's default, adapters in fp32 whatever the model's dtype."""
    try:
        import peft
    except ImportError as error:
        raise NotInstalledError("peft is not installed: pip install 'losia_dist[benchmarks]'") from error
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(_for_adapters(shape), config, autocast_adapter_dtype=autocast)
    return _adapted(f"{name} r = {rank}" + ("" if autocast else ", adapters in the model's dtype"), model, shape)


def shira(shape: Shape) -> Method:
    """PEFT's SHiRA: a sparse high-rank adapter at fixed random places, of as many values as the subnets have."""
    try:
        import peft
    except ImportError as error:
        raise NotInstalledError("peft is not installed: pip install 'losia_dist[benchmarks]'") from error
    config = peft.ShiraConfig(r=equal_lora_rank(shape), target_modules=[*_TARGETS], task_type="CAUSAL_LM")
    return _adapted("SHiRA, equal parameters", peft.get_peft_model(_for_adapters(shape), config), shape)


def galore(shape: Shape, rank: int = 128) -> Method:
    """GaLore's AdamW (the optimizer that Transformers' Trainer takes): full gradients, projected to rank for the moments.

    The projection is renewed every 200 steps by an SVD of every gradient; it happens in warm-up, outside what is timed.
    """
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise NotInstalledError("galore-torch is not installed: pip install 'losia_dist[benchmarks]'") from error
    model = shape.model().requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in target_linears(model)]
    group = {"params": weights, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=1e-5, no_deprecation_warning=True)
    return Method(f"GaLore r = {rank}, SVD not counted", model, plain_step(model, optimizer), optimizer)


def losia(
    shape: Shape,
    *,
    localizing: bool,
    rank_factor: Any = RANK_FACTOR,
    period: int = NEVER,
    weight_products: str | None = None,
    name: str = "",
) -> Method:
    """This package. Without `localizing` no layer collects importance, as in all layers but one of a real step."""
    model, config = shape.model(), LoSiAConfig(rank_factor=rank_factor, period=period, weight_products=weight_products)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-5), lr=1e-5)
    conductor = LoSiA(model, optimizer, config)
    if not localizing:
        for layer in conductor.sites:
            layer.gradient_sink = None

    default = "LoSiA, localizing one layer" if localizing else "LoSiA, not localizing"
    return Method(name or default, model, losia_step(model, optimizer, conductor), optimizer, conductor)


def short(shape: Shape) -> Method:
    """This package by the preset for short runs: drawn, 1 x 1/16, a slot every two steps, moves included. Random weights have
    no outliers to look for before the first step."""
    config = LoSiAConfig.preset("short")
    assert isinstance(config.selection, Drawn)
    config = dataclasses.replace(config, selection=dataclasses.replace(config.selection, outlier_limit=None))
    model = get_losia_model(shape.model(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-5), lr=1e-5)
    conductor = LoSiA(model, optimizer, config, total_steps=shape.layers * config.period * config.cycles)

    return Method("LoSiA, preset short, slots", model, losia_step(model, optimizer, conductor), optimizer, conductor)


def equal_lora_rank(shape: Shape, rank_factor: float = RANK_FACTOR) -> int:
    """The LoRA rank that trains about as many parameters as subnets of this rank factor do."""
    sizes = shape.linears()
    return max(1, round(sum(m * n for m, n in sizes) * rank_factor**2 / sum(m + n for m, n in sizes)))


def target_linears(model: Any) -> list[nn.Linear]:
    """The linear layers of the decoder: what every method here trains."""
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def losia_step(model: nn.Module, optimizer: torch.optim.Optimizer, conductor: LoSiA) -> Callable[[Tensor], bool]:
    """A training step of this package; True where it ended a slot."""

    def step(tokens: Tensor) -> bool:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        relocalized = conductor.step()
        optimizer.zero_grad(set_to_none=True)
        return bool(relocalized)

    return step


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    """Forward, backward, optimizer, and gradients let go."""

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _for_adapters(shape: Shape) -> Any:
    model = shape.model()
    if shape.checkpointing:
        model.enable_input_require_grads()
    return model


def _adapted(name: str, model: nn.Module, shape: Shape) -> Method:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=shape.device != "cpu")
    return Method(name, model, plain_step(model, optimizer), optimizer)
