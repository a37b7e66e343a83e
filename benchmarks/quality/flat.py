"""Noise on the subnets while gradients are taken, as Flat-LoRA (Li et al., arXiv 2409.14396) does for its flat minima."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losia_dist import LoSiA
from losia_dist.subnet.site import Site


class FlatNoise:
    """Adds to every trained weight of row i noise of deviation size * |W_i| / sqrt(n) before each forward pass that trains,
    and takes it off again before the optimizer steps: the gradient is that of the loss around the weights, not at them."""

    def __init__(self, conductor: LoSiA, model: Any, optimizer: torch.optim.Optimizer, size: float, seed: int) -> None:
        self.sites, self.size = conductor.sites, size
        self.drawn = torch.Generator().manual_seed(seed)
        self.added: list[tuple[Site, Tensor]] = []
        model.base_model.register_forward_pre_hook(lambda inner, _: self.add() if inner.training else None)
        optimizer.register_step_pre_hook(lambda *_: self.remove())

    @torch.no_grad()
    def add(self) -> None:
        """Once between two steps."""
        if self.added:
            return
        for site in self.sites:
            norms = torch.linalg.vector_norm(site.as_rows(site.weight), dim=1)[site.row_index]
            noise = torch.randn(site.subnet.shape, generator=self.drawn)
            noise *= self.size * site.shape[1] ** -0.5 * norms[:, None]
            self.added.append((site, site.subnet.clone()))
            site.subnet.add_(noise)

    @torch.no_grad()
    def remove(self) -> None:
        """The very values from before."""
        for site, values in self.added:
            site.subnet.copy_(values)
        self.added.clear()
