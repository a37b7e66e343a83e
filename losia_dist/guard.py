"""Checks that cost next to nothing and stop a run that would otherwise waste money: agreement, engagement, finiteness."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.agreement import Agreement
from losia_dist.errors import ConfigError, DivergenceError, EngagementError
from losia_dist.fingerprint import fingerprint, loading_print
from losia_dist.localization.collectives import RowCollectives
from losia_dist.sharding.interface import ParameterAccess, StateAccess
from losia_dist.subnet.linear import SubnetLinear


def check_same_on_all_ranks(what: str, values: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise on every rank, with the first differing entry and who has which value, unless all ranks pass the same.

    `values` must be plain JSON values. Called by all ranks of the group, before any collective that depends on them.

    Raises:
        ConfigError: some rank has other values.
    """
    gathered = Agreement(group, is_own=True).gather(json.loads(json.dumps(values)))
    for name in sorted(set().union(*gathered)):
        by_rank = [entry.get(name) for entry in gathered]
        odd = next((rank for rank, value in enumerate(by_rank) if value != by_rank[0]), None)
        if odd is not None:
            raise ConfigError(
                f"ranks differ in {what}: {name} is {by_rank[0]!r} on rank 0 and {by_rank[odd]!r} on rank {odd}. "
                "Start every rank with the same code, files and options."
            )


def any_rank(flag: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether the flag is set on some rank of the group; the same answer on all of them, who all call."""
    return any(Agreement(group, is_own=True).gather(flag))


def subnet_prints(layer: SubnetLinear, *values: Tensor) -> Tensor:
    """What `check_relocalized` compares of a layer: fingerprints [1 + len(values)] of its places and of whole tensors."""
    places = fingerprint(layer.row_index) * 31 + fingerprint(layer.col_index)
    return torch.stack([places, *(fingerprint(tensor).to(places.device) for tensor in values)])


def check_relocalized(layers: list[SubnetLinear], prints: Tensor, collectives: RowCollectives) -> None:
    """Compare re-localized subnets over the ranks: their places, the values left in the weights and those taken from them.

    prints: [layers, 3], `subnet_prints` of each. One collective of that size; called by all ranks.

    Raises:
        DivergenceError: on every rank, with the ranks that differ from most, the layers, and what differs in them.
    """
    parts = ("chosen places", "values left in the weight", "values read from the weight")
    _check_agreement(layers, prints, parts, collectives)


def check_same_subnets(layers: list[SubnetLinear], parameters: ParameterAccess, collectives: RowCollectives) -> None:
    """Compare all subnets over the ranks, places and present values: before the first step, and after a restart.

    Where each rank keeps a part of every weight there is one whole only, and ranks that loaded different weights have mixed
    them. That is seen by what each rank's own weights held when the model was converted: the whole must be what some rank
    had then, unless all of them had the same (and it was loaded anew since).

    Raises:
        DivergenceError: as `check_relocalized`.
    """
    if collectives.world_size == 1:
        return
    prints: list[Tensor] = []
    rounded: list[Tensor] = []
    for layer in layers:
        values = parameters.read_whole(layer.subnet)  # one layer's at a time
        prints.append(subnet_prints(layer, values))
        rounded.append(loading_print(values).to(prints[0].device))
    _check_agreement(layers, torch.stack(prints), ("places", "values"), collectives)
    now = torch.stack(rounded)
    unknown = torch.zeros_like(now[0])  # converted on the meta device
    then = [unknown if layer.converted_print.is_meta else layer.converted_print.to(now.device) for layer in layers]
    everyone = collectives.stack(torch.stack(then)).tolist()
    for layer, whole, by_rank in zip(layers, now.tolist(), zip(*everyone, strict=True), strict=True):
        if 0 not in by_rank and len(set(by_rank)) > 1 and whole not in by_rank:
            raise DivergenceError(
                f"the weights of {layer.name} are a mixture: ranks held different values when the model was converted, and now "
                "each keeps its part of its own. Load the same checkpoint on every rank (or seed them alike) before the model "
                "is sharded, or let one rank send its weights to the others."
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
        return torch.stack([torch.zeros((), dtype=torch.int64) if f is None else fingerprint(f).cpu() for f in fragments])


def _check_agreement(layers: list[SubnetLinear], prints: Tensor, parts: tuple[str, ...], collectives: RowCollectives) -> None:
    """prints [layers, parts]: raise on every rank unless all ranks hold the same."""
    if collectives.world_size == 1:
        return
    everyone = collectives.stack(prints.reshape(-1)).view(collectives.world_size, *prints.shape).tolist()
    if all(theirs == everyone[0] for theirs in everyone):
        return
    assert collectives.group is not None
    ranks = dist.get_process_group_ranks(collectives.group)
    camps: dict[str, list[int]] = {}  # group ranks that hold the same
    for place, theirs in enumerate(everyone):
        camps.setdefault(repr(theirs), []).append(place)
    most, *others = sorted(camps.values(), key=len, reverse=True)
    usual = everyone[most[0]]
    if 2 * len(most) > len(ranks):
        against = f"the other {len(most)} ranks" if len(others) == 1 else f"most ranks ({_ranks(most, ranks)})"
    else:
        against = f"{_ranks(most, ranks)} (no majority: either may be wrong)"
    findings = []
    for camp in others[:3]:
        found: dict[str, list[str]] = {}
        for layer, mine, theirs in zip(layers, everyone[camp[0]], usual, strict=True):
            for part, one, other in zip(parts, mine, theirs, strict=True):
                if one != other:
                    found.setdefault(part, []).append(layer.name)
        what = "; ".join(f"{part} of {_some(names)}" for part, names in found.items())
        findings.append(f"{_ranks(camp, ranks)}: {what}")
    raise DivergenceError(
        f"ranks hold different subnets. Differing from {against}, {'. '.join(findings)}. Different data on each rank is fine; "
        "different weights, different code or faulty memory are not. Start every rank from the same checkpoint; if they were "
        "the same at the start, resume from an earlier checkpoint, and test the memory of that rank's machine."
    )


def _ranks(places: list[int], ranks: list[int]) -> str:
    names = [str(ranks[place]) for place in places]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {_some(names)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
