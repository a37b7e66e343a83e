"""Steps of a column divided by the size of its input neuron: tells what the neurons with the largest activations do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losia_dist import LoSiA
from losia_dist.subnet.site import Site


class ColumnSteps:
    """Adam steps every weight by about the learning rate, so that an output neuron moves most with its largest inputs, which
    are the ones that a located subnet holds. Here the optimizer's step of column j is multiplied by r_j^-exponent over its
    mean in the subnet (r_j: root mean square of input neuron j over the tokens of the first forward pass), at most by 4:
    the subnet's mean rate stays, and with exponent 1 all columns move the output alike. One process."""

    def __init__(self, conductor: LoSiA, optimizer: torch.optim.Optimizer, exponent: float) -> None:
        self.sites, self.exponent = conductor.sites, exponent
        self.sizes: dict[nn.Module, Tensor] = {}
        self.before: list[Tensor] = []
        for site in self.sites:
            site.module.register_forward_pre_hook(self._measure)
        optimizer.register_step_pre_hook(lambda *_: self._keep())
        optimizer.register_step_post_hook(lambda *_: self._scale())

    def factors(self, site: Site) -> Tensor:
        """What the steps of the subnet's columns are multiplied by, [c]."""
        inverse = self.sizes[site.module][site.col_index].clamp_min(1e-6) ** -self.exponent
        return (inverse / inverse.mean()).clamp_max(4.0)

    @torch.no_grad()
    def _measure(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module not in self.sizes:
            self.sizes[module] = inputs[0].float().flatten(0, -2).square().mean(0).sqrt()

    @torch.no_grad()
    def _keep(self) -> None:
        self.before = [site.subnet.clone() for site in self.sites]

    @torch.no_grad()
    def _scale(self) -> None:
        for site, before in zip(self.sites, self.before, strict=True):
            site.subnet.sub_(before).mul_(self.factors(site)).add_(before)
        self.before = []
