"""DeepSpeed's TiledMLP (of Arctic Long Sequence Training) for a model with subnets: some tokens of a long sequence at a time.

Every tile is computed again in backward, by a backward pass of its own, which adds to the gradients of the MLP's parameters.
The engine is to reduce a gradient once, after the last tile, and what localizes is to see one full gradient.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from losia_dist.errors import ConfigError, UnsupportedError, some
from losia_dist.loss.chunked import GradientSum
from losia_dist.subnet.linear import SubnetLinear
from losia_dist.subnet.site import GradientSink, Site


def use_tiled_mlp(model: Any, tiles: int) -> Any:
    """Let the MLP of every decoder layer compute a micro-batch in `tiles` parts, so that its inside exists for one at a time.

    Changes the model in place and returns it. Called on every rank after `get_losia_model` and before an engine wraps the
    model: DeepSpeed's, any stage, or one process alone. Losses and gradients are the same up to rounding. Costs one more
    forward of the MLPs a step. Where MLPs recompute anyway (gradient checkpointing), the memory of one MLP's inside is what is
    saved. A layer that localizes keeps its full gradient [m, n], in fp32, from the first tile to the last.

    Before training (`LoSiA.locate`) micro-batches are computed whole: importance and sizes of inputs are those of whole calls.

    Args:
        tiles: at least 1; the same on every rank, as ZeRO-3 gathers weights once a tile.

    Raises:
        ConfigError: no number of tiles, a model that was not converted before, or one without such MLPs.
        UnsupportedError: an MLP with dropout, which would fall otherwise when it is computed again.
    """
    if not isinstance(tiles, int) or isinstance(tiles, bool) or tiles < 1:
        raise ConfigError(f"tiles={tiles!r}: give the number of parts that a micro-batch is computed in, at least 1.")
    name = type(model).__name__
    if not any(isinstance(module, SubnetLinear) for module in model.modules()):
        raise ConfigError(f"{name} has no subnets yet: call use_tiled_mlp after get_losia_model.")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    found = {
        f"{path}.{child}": module
        for path, layer in layers.items()
        for child, module in layer.named_children()
        if type(module).__name__.endswith("MLP")
    }
    if not found:
        raise ConfigError(
            f"{name} has no MLP that can be tiled: in each decoder layer a module whose class is called ...MLP is looked for. "
            "Leave the tiles out."
        )
    noisy = [path for path, module in found.items() if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())]
    if noisy:
        raise UnsupportedError(
            f"{some(noisy, 1)} has dropout, which would fall otherwise when a tile is computed again in backward. Set it to 0 "
            "in the model's configuration, or leave the tiles out."
        )
    for module in found.values():
        TiledForward.adopt(module, tiles)
    return model


class TiledForward(nn.Module):
    """An MLP that computes its tokens in parts. x [..., n] -> [..., n], any floating dtype.

    Attributes:
        tiles: parts of each call, whatever its number of tokens: ranks that gather weights must do so equally often.
    """

    tiles: int

    @classmethod
    def adopt(cls, module: Any, tiles: int) -> None:
        """Turn an MLP in place into one that does; its parameters and names stay what they were."""
        if not isinstance(module, TiledForward):
            kind: Any = type(module)
            module.__class__ = _tiled(kind)
        module.tiles = tiles
        for site in _sites(module):
            site.is_tiled = True

    def forward(self, x: Tensor) -> Tensor:
        """All tokens of all rows one after the other, cut into `tiles` parts."""
        whole: Any = super().forward
        if self.tiles == 1 or any(_calibrates(site) for site in _sites(self)):
            return whole(x)  # type: ignore[no-any-return]
        trained = [p for p in self.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and trained and not x.requires_grad:
            x = x.detach().requires_grad_()  # else nothing would tell autograd to come back here
        flat = x.reshape(1, -1, x.shape[-1])
        tokens = flat.shape[1]
        parts = math.ceil(tokens / math.ceil(tokens / self.tiles))
        if parts != self.tiles:  # fewer: DeepSpeed would wait for the last one
            flat = functional.pad(flat, (0, 0, 0, -tokens % self.tiles))
        y: Tensor = _function().apply(_one_tile, self, flat, self.tiles, trained)
        return y[:, :tokens].reshape(x.shape)


@cache
def _tiled(kind: type[nn.Module]) -> type[TiledForward]:
    return type(f"Tiled{kind.__name__}", (TiledForward, kind), {})


def _one_tile(module: Any, x: Tensor) -> Tensor:
    y: Tensor = super(TiledForward, module).forward(x)
    return y


@cache
def _function() -> Any:
    """DeepSpeed's Function, with one full gradient for what localizes. Made late: DeepSpeed takes seconds to import."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    class TiledSubnetMLP(TiledMLP):  # type: ignore[misc]
        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            held = [(site, site.gradient_sink) for site in _sites(ctx.self) if site.gradient_sink is not None]
            for site, sink in held:
                site.gradient_sink = _AfterLastTile(sink, ctx.shards)
            try:
                return TiledMLP.backward(ctx, *gradients)
            finally:
                for site, sink in held:
                    site.gradient_sink = sink

    return TiledSubnetMLP


class _AfterLastTile:
    """Takes a layer's full gradient [m, n] of each tile, and hands on their sum with the last: the weight is there then."""

    def __init__(self, sink: GradientSink, tiles: int) -> None:
        self._sink, self._left, self._sum = sink, tiles, GradientSum()

    def __call__(self, gradient: Tensor, weight: Tensor) -> None:
        self._sum.add(gradient)
        self._left -= 1
        if self._left == 0:
            assert self._sum.total is not None
            self._sink(self._sum.total.to(gradient.dtype), weight)


def _sites(module: nn.Module) -> list[Site]:
    return [one.site for one in module.modules() if isinstance(one, SubnetLinear)]


def _calibrates(site: Site) -> bool:
    """Whether what is measured is no sum over tiles: importance of a micro-batch, or the size of what enters."""
    return site.input_sink is not None or getattr(site.gradient_sink, "one_at_a_time", False)
