"""Checks that cost next to nothing and stop a run that would otherwise waste money: agreement, engagement, finiteness."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.errors import ConfigError, DivergenceError, EngagementError
from losia_dist.localization.collectives import RowCollectives
from losia_dist.sharding.interface import StateAccess
from losia_dist.subnet.linear import SubnetLinear


def check_same_on_all_ranks(what: str, values: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise on every rank, with the first differing entry and who has which value, unless all ranks pass the same.

    `values` must be plain JSON values. Called by all ranks of the group, before any collective that depends on them.

    Raises:
        ConfigError: some rank has other values.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, json.loads(json.dumps(values)), group=group)
    for name in sorted(set().union(*gathered)):
        by_rank = [entry.get(name) for entry in gathered]
        odd = next((rank for rank, value in enumerate(by_rank) if value != by_rank[0]), None)
        if odd is not None:
            raise ConfigError(
                f"ranks differ in {what}: {name} is {by_rank[0]!r} on rank 0 and {by_rank[odd]!r} on rank {odd}. "
                "Start every rank with the same code, files and options."
            )


def check_same_subnets(layers: list[SubnetLinear], collectives: RowCollectives) -> None:
    """Compare the subnets' places over the ranks: one number per layer is exchanged.

    Raises:
        DivergenceError: with the names of the rank and of the layer, on every rank.
    """
    if collectives.world_size == 1:
        return
    prints = torch.stack([_fingerprint(layer.row_index) * 31 + _fingerprint(layer.col_index) for layer in layers])
    everyone = collectives.stack(prints).tolist()
    for rank, theirs in enumerate(everyone):
        for layer, first, other in zip(layers, everyone[0], theirs, strict=True):
            if first != other:
                raise DivergenceError(
                    f"rank {rank} chose another subnet for {layer.name} than rank 0. The ranks have diverged (different "
                    "data order is fine; different weights, code or hardware faults are not): resume from a checkpoint."
                )


def check_finite(objectives: list[Tensor], layers: list[SubnetLinear]) -> None:
    """Refuse to choose a subnet from importance that is not finite. One host synchronisation per re-localization.

    Raises:
        DivergenceError: the gradients were infinite or not a number somewhere in the slot. Same on every rank.
    """
    finite = torch.isfinite(torch.stack(objectives)).tolist()
    bad = [layer.name for layer, fine in zip(layers, finite, strict=True) if not fine]
    if bad:
        raise DivergenceError(
            f"the importance of {_some(bad)} is not finite: a gradient in this slot was infinite or not a number. "
            "Lower the learning rate or set gradient clipping, and resume from an earlier checkpoint."
        )


class EngagementCheck:
    """After the first step with a learning rate above zero: every subnet received a gradient, and changed.

    Holds no copy of the subnets: a fingerprint of each master fragment before the step is compared with one after.
    """

    def __init__(self, layers: list[SubnetLinear], state: StateAccess, collectives: RowCollectives) -> None:
        self.layers, self.state, self.collectives = layers, state, collectives
        self.received = [torch.zeros((), dtype=torch.int64, device=layer.row_index.device) for layer in layers]
        self.before = self._fingerprints()
        for place, layer in enumerate(layers):
            layer.gradient_witness = self._witness(place)

    def verify(self, rates: dict[str | None, float]) -> bool:
        """Call after each step until it returns True; `rates` maps a group to the learning rate it was stepped with.

        Raises:
            EngagementError: names the layers, on every rank.
        """
        if any(rates.get(layer.group_name, 0.0) == 0.0 for layer in self.layers):
            return False  # warmup from zero: nothing can have changed yet
        changed = (self._fingerprints() != self.before).to(torch.int64)
        seen = self.collectives.largest(torch.stack([torch.stack(self.received), changed.to(self.received[0].device)]))
        received, changed_anywhere = seen.bool().tolist()
        without = [layer.name for layer, ok in zip(self.layers, received, strict=True) if not ok]
        if without:
            raise EngagementError(
                f"no gradient reached the subnets of {_some(without)} in the first step. Causes seen: reentrant gradient "
                "checkpointing without model.enable_input_require_grads(); a layer that the forward pass never calls "
                "(leave it out of target_modules); a batch without a single label."
            )
        still = [layer.name for layer, ok in zip(self.layers, changed_anywhere, strict=True) if not ok]
        if still:
            raise EngagementError(
                f"the subnets of {_some(still)} received a gradient but did not change in the first step. Causes seen: an "
                "optimizer that does not hold them; a learning rate too small for the dtype (use LoSiAAdamW, which keeps "
                "fp32 master values)."
            )
        for layer in self.layers:
            layer.gradient_witness = None
        return True

    def _witness(self, place: int) -> Callable[[Tensor], None]:
        def witness(gradient: Tensor) -> None:
            self.received[place] |= gradient.detach().any()

        return witness

    def _fingerprints(self) -> Tensor:
        """One number per subnet, of the part of its master values that this rank keeps."""
        fragments = [self.state.master_fragment(layer.subnet) for layer in self.layers]
        return torch.stack([torch.zeros((), dtype=torch.int64) if f is None else _fingerprint(f).cpu() for f in fragments])


def _fingerprint(values: Tensor) -> Tensor:
    """A 64-bit sum over the bits of a tensor, each weighted by its place; any change of an element changes it."""
    values = values.detach().reshape(-1)
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    elif values.dtype == torch.float32:
        values = values.view(torch.int32)
    values = values.to(torch.int64)
    return ((values + 1) * torch.arange(1, values.numel() + 1, device=values.device)).sum()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
