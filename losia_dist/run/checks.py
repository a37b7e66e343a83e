"""Checks that cost next to nothing and stop a run that would otherwise waste money: agreement, engagement, finiteness."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, DivergenceError, EngagementError, UnsupportedError, some
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.search import Choice
from losia_dist.ranks.fingerprint import fingerprint, loading_print
from losia_dist.run.parts import RunParts
from losia_dist.sharding.expert_parallel import refuse_unfit
from losia_dist.sharding.packed_access import PackedAccess
from losia_dist.subnet.float8 import refuse_device
from losia_dist.subnet.listed_experts import is_listed
from losia_dist.subnet.packed import same_scales
from losia_dist.subnet.site import Site

logger = logging.getLogger(__name__)


def subnet_prints(site: Site, *values: Tensor) -> Tensor:
    """What `check_relocalized` compares of a layer: fingerprints [1 + len(values)] of its places and of whole tensors."""
    places = fingerprint(site.row_index) * 31 + fingerprint(site.col_index)
    return torch.stack([places, *(fingerprint(tensor).to(places.device) for tensor in values)])


def check_relocalized(sites: list[Site], prints: Tensor, collectives: RowCollectives) -> None:
    """Compare re-localized subnets over the ranks: their places, the values left in the weights and those taken from them.

    prints: [layers, 3], `subnet_prints` of each. One collective of that size; called by all ranks.

    Raises:
        DivergenceError: on every rank, with the ranks that differ from most, the layers, and what differs in them.
    """
    parts = ("chosen places", "values left in the weight", "values read from the weight")
    check_agreement(sites, prints, parts, collectives)


def check_same_subnets(parts: RunParts) -> None:
    """Compare all subnets over the ranks, places and present values: before the first step, and after a restart.

    Where each rank keeps a part of every weight there is one whole only, and ranks that loaded different weights have mixed
    them. That is seen by what each rank's own weights held when the model was converted: the whole must be what some rank
    had then, unless all of them had the same (and it was loaded anew since).

    Raises:
        DivergenceError: as `check_relocalized`.
    """
    sites, collectives = parts.sites, parts.collectives
    if collectives.world_size == 1:
        return
    _check_same_scales(parts)
    prints: list[Tensor] = []
    rounded: list[Tensor] = []
    for site in sites:
        values = parts.parameters.read_whole(site.subnet)  # one layer's at a time
        prints.append(subnet_prints(site, values))
        rounded.append(loading_print(values).to(prints[0].device))
    check_agreement(sites, torch.stack(prints), ("places", "values"), collectives)
    now = torch.stack(rounded)
    unknown = torch.zeros_like(now[0])  # converted on the meta device
    then = [unknown if site.converted_print.is_meta else site.converted_print.to(now.device) for site in sites]
    everyone = collectives.stack(torch.stack(then)).tolist()
    for site, whole, by_rank in zip(sites, now.tolist(), zip(*everyone, strict=True), strict=True):
        if 0 not in by_rank and len(set(by_rank)) > 1 and whole not in by_rank:
            raise DivergenceError(
                f"the weights of {site.name} are a mixture: ranks held different values when the model was converted, and now "
                "each keeps its part of its own. Load the same checkpoint on every rank (or seed them alike) before the model "
                "is sharded, or let one rank send its weights to the others."
            )


def _check_same_scales(parts: RunParts) -> None:
    """Compare the scales of a quantized base over the ranks: each keeps its own, whoever sends the codes.

    Raises:
        DivergenceError: the first layer whose scales differ. Same on every rank.
    """
    if not isinstance(parts.parameters, PackedAccess):
        return
    layers = parts.parameters.layers
    mine = torch.tensor([layer.packed.figures() for layer in layers.values()], dtype=torch.float64)
    device = parts.sites[0].row_index.device
    by_rank = parts.collectives.stack(mine.flatten().to(device)).view(-1, *mine.shape).tolist()
    for rank, theirs in enumerate(by_rank):
        for name, one, other in zip(layers, by_rank[0], theirs, strict=True):
            if not same_scales(one, other):
                raise DivergenceError(
                    f"ranks hold different scales of the quantized weight of {name} (rank 0 and rank {rank}): they loaded "
                    "different base models, and would compute with different weights. Load the same files on every rank "
                    "before get_losia_model."
                )


def refuse_unusable(sites: list[Site], config: LoSiAConfig, process_group: dist.ProcessGroup | None) -> None:
    """What a converted model may not be when training begins; each rank by itself.

    Raises:
        UnsupportedError: fp16; subnets that an engine cast to another dtype than they were asked for; experts that are modules
            of their own where ranks reduce full gradients together; experts that are spread in a way that does not go; products
            in FP8 on a device without them.
        ConfigError: the model was converted with another `weight_products` than this configuration has.
    """
    refuse_unfit(sites, config, process_group)
    _refuse_products(sites, config)
    _refuse_listed(sites, config, dist.get_world_size(process_group) if dist.is_initialized() else 1)
    for site in sites:
        if torch.float16 in (site.subnet.dtype, site.weight.dtype):
            raise UnsupportedError(
                f"{site.name} is in fp16: the gradient scale would enter the importance. Load the model in bf16 or fp32."
            )
        if site.asked_dtype not in (None, site.subnet.dtype):
            raise UnsupportedError(
                f"the subnet of {site.name} was asked for in {site.asked_dtype} (subnet_dtype) and is in "
                f"{site.subnet.dtype}: model.to(...) or the engine cast it. Cast the model before get_losia_model; with "
                "DeepSpeed leave subnet_dtype out (it keeps fp32 master values itself)."
            )


def _refuse_products(sites: list[Site], config: LoSiAConfig) -> None:
    in_float8 = [site for site in sites if site.in_float8]
    if bool(in_float8) != (config.weight_products is not None):
        found = "fp8" if in_float8 else None
        raise ConfigError(
            f"weight_products={config.weight_products!r}, but the model was converted with {found!r}: pass LoSiA(...) the "
            "configuration that get_losia_model was given."
        )
    for site in in_float8[:1]:
        refuse_device(site.row_index.device)


def _refuse_listed(sites: list[Site], config: LoSiAConfig, world_size: int) -> None:
    listed = [site.name for site in sites if site.experts is None and is_listed(site.name)]
    if listed and world_size > 1 and config.located is not None and not config.by_rank:
        raise UnsupportedError(
            f"{some(listed, 1)} is an expert that is a module of its own: a rank without a token for it forms no full "
            "gradient, and the others would wait. Draw subnets (selection: random), let each rank localize by itself "
            "(Located(reduction='by_rank')), or leave the experts out of target_modules."
        )


def refuse_unlocated(config: LoSiAConfig) -> None:
    """A step is asked for, and the first subnets still wait for calibration batches.

    Raises:
        ConfigError: always.
    """
    if config.outlier_limit is not None:
        raise ConfigError(
            f"outlier_limit={config.outlier_limit}, but no calibration batches were given: call losia.locate(batches) "
            "on every rank before the first step, or leave outlier_limit out."
        )
    raise ConfigError(
        "start='importance', but the first subnets have not been located: call losia.locate(batches) on every rank "
        "before the first step, or set start='random'."
    )


def check_choices(choices: list[Choice], sites: list[Site], collectives: RowCollectives) -> None:
    """Refuse to choose a subnet from importance that is not finite, and say which layers keep theirs for want of any.

    One host synchronisation per re-localization.

    Raises:
        DivergenceError: the gradients were infinite or not a number somewhere in the slot. Same on every rank.
    """
    scores = torch.stack([torch.stack([choice.inside.sum(), choice.total.sum()]) for choice in choices]).tolist()
    bad = [site.name for site, (inside, _) in zip(sites, scores, strict=True) if not math.isfinite(inside)]
    if bad:
        raise DivergenceError(
            f"the importance of {some(bad)} is not finite: a gradient in this slot was infinite or not a number. "
            "Lower the learning rate or set gradient clipping, and resume from an earlier checkpoint."
        )
    silent = [site.name for site, (_, total) in zip(sites, scores, strict=True) if total == 0]
    if silent and collectives.rank == 0:
        logger.warning(
            "%s had no gradient other than zero to choose a subnet by, and keep the one they have. Causes seen: batches "
            "without a label or an advantage; a part of the model that starts at zero; a layer the loss does not depend on.",
            some(silent),
        )


class EngagementCheck:
    """After the first step with a learning rate above zero: every subnet received a gradient, and changed.

    A gradient of exact zeros waits (a first batch without a label or an advantage, a block that starts at zero): it is looked
    at again after 2, 4, 8, ... steps. One that never came is an error, as is a subnet that one did not change. Holds no copy
    of the subnets: a fingerprint of each master fragment before is compared with one after.
    """

    def __init__(self, parts: RunParts) -> None:
        self.sites, self.state, self.collectives = list(parts.sites), parts.state, parts.collectives
        sites = self.sites
        device = sites[0].row_index.device
        self._steps, self._due = 0, 1  # steps seen with a learning rate above zero, and when to look next
        self._came = dict.fromkeys(sites, False)
        self._signal = {site: torch.zeros((), dtype=torch.int64, device=device) for site in sites}
        self._before = {site: self._fingerprint(site) for site in sites}
        for site in sites:
            site.gradient_witness = self._witness(site)

    def verify(self, rates: dict[str | None, float]) -> bool:
        """Call after each step until it returns True; `rates` maps a group to the learning rate it was stepped with.

        Raises:
            EngagementError: names the layers, on every rank.
        """
        if any(rates.get(site.group_name, 0.0) == 0.0 for site in self.sites):
            return False  # warmup from zero: nothing can have changed yet
        self._steps += 1
        if self._steps < self._due:
            return False
        self._due *= 2
        came, signal, changed = self._facts()
        never = [site.name for site, ok in zip(self.sites, came, strict=True) if not ok]
        if never:
            raise EngagementError(
                f"no gradient reached the subnets of {some(never)} in the first step. Causes seen: a layer that the forward "
                "pass never calls, or whose output the loss does not use (leave it out of target_modules); a forward pass "
                "under torch.no_grad(); reentrant gradient checkpointing without model.enable_input_require_grads()."
            )
        still = [site.name for site, got, ok in zip(self.sites, signal, changed, strict=True) if got and not ok]
        if still:
            raise EngagementError(
                f"the subnets of {some(still)} received a gradient but did not change. Causes seen: an "
                "optimizer that does not hold them; a learning rate too small for the dtype (use LoSiAAdamW, which keeps "
                "fp32 master values)."
            )
        for site, got in zip(self.sites, signal, strict=True):
            if got:
                site.gradient_witness = None
        self.sites = [site for site, got in zip(self.sites, signal, strict=True) if not got]
        if self.sites and self.collectives.rank == 0:
            logger.warning(
                "after step %d the gradients of %d subnets have been exact zeros (%s), which trains nothing there yet. It is "
                "looked at again after step %d.",
                self._steps,
                len(self.sites),
                some([site.name for site in self.sites]),
                self._due,
            )
        return not self.sites

    def moved(self, sites: list[Site]) -> None:
        """These layers got other subnets before they were seen to train: what is compared begins anew."""
        for site in sites:
            if site in self._before:
                self._before[site] = self._fingerprint(site)
                self._signal[site].zero_()

    def _witness(self, site: Site) -> Callable[[Tensor], None]:
        def witness(gradient: Tensor) -> None:
            self._came[site] = True
            self._signal[site] |= gradient.detach().any()

        return witness

    def _facts(self) -> list[list[bool]]:
        """For the layers that are left, on any rank: a gradient came, it was other than zero, the master values changed."""
        signal = torch.stack([self._signal[site] for site in self.sites])
        came = torch.tensor([self._came[site] for site in self.sites])
        changed = torch.stack([self._fingerprint(site) != self._before[site] for site in self.sites])
        seen = torch.stack([came.to(signal), signal, changed.to(signal)])
        facts: list[list[bool]] = self.collectives.largest(seen).bool().tolist()
        return facts

    def _fingerprint(self, site: Site) -> Tensor:
        """One number, of the part of the subnet's master values that this rank keeps."""
        fragment = self.state.master_fragment(site.subnet)
        return torch.zeros((), dtype=torch.int64) if fragment is None else fingerprint(fragment).cpu()


def check_agreement(sites: list[Site], prints: Tensor, parts: tuple[str, ...], collectives: RowCollectives) -> None:
    """Raise on every rank unless all hold the same prints [layers, parts]; called by all ranks.

    Raises:
        DivergenceError: as `check_relocalized`.
    """
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
        for site, mine, theirs in zip(sites, everyone[camp[0]], usual, strict=True):
            for part, one, other in zip(parts, mine, theirs, strict=True):
                if one != other:
                    found.setdefault(part, []).append(site.name)
        what = "; ".join(f"{part} of {some(names)}" for part, names in found.items())
        findings.append(f"{_ranks(camp, ranks)}: {what}")
    raise DivergenceError(
        f"ranks hold different subnets. Differing from {against}, {'. '.join(findings)}. Different data on each rank is fine; "
        "different weights, different code or faulty memory are not. Start every rank from the same checkpoint; if they were "
        "the same at the start, resume from an earlier checkpoint, and test the memory of that rank's machine."
    )


def _ranks(places: list[int], ranks: list[int]) -> str:
    names = [str(ranks[place]) for place in places]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {some(names)}"
