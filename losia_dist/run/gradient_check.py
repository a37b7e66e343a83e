"""After the first step: the optimizer was stepped by the gradients that backward formed, averaged over the ranks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losia_dist.errors import DivergenceError
from losia_dist.optim.adamw import local_part
from losia_dist.run.parts import RunParts
from losia_dist.sharding.sequence_parallel import SequenceRanks
from losia_dist.subnet.groups import GROUP_KEY
from losia_dist.subnet.listed_experts import is_listed
from losia_dist.subnet.site import Site

_TOLERANCE = 0.02  # of a norm: bf16 gradients are rounded on their way
_MOST = 1 << 26  # elements that are kept for the length of one step: 256 MB in fp32


class GradientCheck:
    """Compares norms in the first step that has a gradient, on every engine: the library's own reduction against the engine's.

    The library's own: local gradients of one optimizer group (the smallest) are summed over the step's micro-batches and
    averaged over the ranks. The engine's: what its step was made by, of all groups. Where the engine clips, its clip factor
    follows from both and is compared with the setting; in a plain loop it may be anything up to 1.

    Holds that group's gradients in fp32 until it is done; costs one all-reduce of them and a pass over all gradients.

    Args:
        parts: of the run. sequence: the engine, if there is one, and the norm that it clips to.
    """

    def __init__(self, parts: RunParts, sequence: SequenceRanks) -> None:
        self.done = False
        self._parts, self._max_norm = parts, sequence.max_norm
        self._sequence = sequence
        self._names = list(dict.fromkeys(group[GROUP_KEY] for group in parts.state.optimizer.param_groups))
        # Squares of this rank's share in the step in progress, by parameter: a step inside a step calls hooks twice.
        self._stepped: dict[str | None, dict[Any, Tensor]] = defaultdict(dict)
        self._was_stepped = False
        self._handle: Any = None
        self._sites = _smallest_group(parts.sites)
        if not self._sites:
            self.done = True
            return
        self._witnesses: list[tuple[Site, Any, Any]] = []
        self._sums = {site: torch.zeros(site.subnet_size, device=site.row_index.device) for site in self._sites}
        self._watch()
        self._handle = parts.state.optimizer.register_step_pre_hook(self._look)

    def verify(self) -> None:
        """Called by all ranks after each step until `done`. Waits for the device.

        Raises:
            DivergenceError: the norms differ. Same on every rank.
        """
        if self.done or not self._was_stepped:
            return
        collectives, device = self._parts.collectives, self._sites[0].row_index.device
        shares = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        for place, name in enumerate(self._names):
            for square in self._stepped[name].values():
                shares[place] += square.to(device)
        squares = dict(zip(self._names, collectives.sum_columns(shares).tolist(), strict=True))
        mean = collectives.sum_columns(torch.cat(list(self._sums.values()))).div_(collectives.world_size)
        own = float(torch.linalg.vector_norm(mean, dtype=torch.float64))
        self.forget()
        stepped, whole = squares.get(self._sites[0].group_name, 0.0) ** 0.5, sum(squares.values()) ** 0.5
        if own == 0 or not own + whole < float("inf"):
            return  # no signal yet; what is not finite ends the run elsewhere
        self.remove()
        factor = stepped / own
        if self._max_norm is None:
            allowed = min(1.0, factor)
        else:
            allowed = min(1.0, self._max_norm / (whole / factor + 1e-6)) if self._max_norm and factor else 1.0
        if abs(factor / allowed - 1 if allowed else factor) > _TOLERANCE:
            clip = "" if self._max_norm is None else f" (clipped to {self._max_norm:g})" if self._max_norm else " (not clipped)"
            raise DivergenceError(
                f"the first step was made by gradients of norm {stepped:.6g}{clip} in {self._sites[0].group_name}, where the "
                f"mean over the ranks of those that backward formed has {own:.6g}, which would give {own * allowed:.6g}: "
                "subnets would be located by another gradient than the one that trains, and clipping would act on it. Causes "
                "seen: an engine that divides by fewer ranks than there are; a loss that is scaled on its way into backward; "
                "gradients that are summed, or scaled up, between backward and the optimizer's step. Average them over the "
                "ranks."
            )
        said = self._sequence.reduced_norm()
        if said and factor and abs(said / (whole / factor) - 1) > _TOLERANCE:
            raise DivergenceError(
                f"the engine takes the norm of its reduced gradients for {said:.6g}, and the mean over the ranks has "
                f"{whole / factor:.6g}: it clips by another gradient than the one that subnets are located by. Causes seen: an "
                "engine that divides by fewer ranks than there are."
            )

    def anew(self) -> GradientCheck:
        """Another check of the same run, which other witnesses may have come into since."""
        self.remove()
        return GradientCheck(self._parts, self._sequence)

    def forget(self) -> None:
        """A step was left out, or looked at: gradients are summed anew."""
        self._stepped.clear()
        self._was_stepped = False
        for total in self._sums.values():
            total.zero_()

    def remove(self) -> None:
        """Leave sites and optimizer as they were found."""
        if self._handle is not None:
            self._handle.remove()
            for site, witness, before in self._witnesses:
                if site.gradient_witness is witness:
                    site.gradient_witness = before
        self.done, self._handle, self._sums, self._witnesses = True, None, {}, []

    def _watch(self) -> None:
        for site in self._sites:
            before = site.gradient_witness

            def witness(gradient: Tensor, site: Site = site, before: Any = before) -> None:
                if before is not None:
                    before(gradient)
                self._sums[site].add_(gradient.detach().reshape(-1))

            site.gradient_witness = witness
            self._witnesses.append((site, witness, before))

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        state, self._was_stepped = self._parts.state, True
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.grad.numel():
                    continue
                parts = state.without_padding(local_part(parameter.grad), parameter)
                if parts:
                    norms = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64))  # squares overflow in fp32
                    self._stepped[group[GROUP_KEY]][parameter] = norms.square().sum() * self._share(parameter.grad)

    def _share(self, gradient: Any) -> float:
        """What a rank's part of a gradient counts in a sum over all ranks, so that each element counts once."""
        ranks = self._parts.collectives.world_size
        if hasattr(gradient, "placements"):
            mesh = gradient.device_mesh
            cut = [mesh.size(d) for d, placement in enumerate(gradient.placements) if not placement.is_replicate()]
            distinct = 1
            for size in cut:
                distinct *= size
            return distinct / ranks
        return 1.0 if self._parts.state.one_scalar_per_group else 1.0 / ranks


def _smallest_group(sites: list[Site]) -> list[Site]:
    """The sites of one optimizer group whose local gradients are known in full; none where there is no such group."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.group_name].append(site)
    fit = [
        group
        for group in groups.values()
        if not any(one.shares_embedding or one.held is not None or is_listed(one.name) for one in group)
    ]
    sizes = [sum(site.subnet_size for site in group) for group in fit]
    return fit[sizes.index(min(sizes))] if sizes and min(sizes) <= _MOST else []
