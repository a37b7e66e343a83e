"""Which shape, and how much of the budget, each layer's subnet gets: from the importance that each choice would capture.

The idea of AdaLoRA (Zhang et al., arXiv 2303.10512) and of sensitivity-driven allocation, for subnets: a fixed number of
trainable values goes where it captures most importance. The result is a `rank_pattern`.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from losia_dist.config.selection import Located
from losia_dist.errors import ConfigError
from losia_dist.formulas import subnet_size
from losia_dist.localization.search import Choice, Query, Sums, greedy, together
from losia_dist.run.conductor import LoSiA
from losia_dist.run.first_subnets import Batches, Loss, run_searches
from losia_dist.subnet.site import Site

Factors = tuple[float, float]


@dataclass(frozen=True)
class Captured:
    """What a subnet of these factors (rows, columns) would hold: values, share of the layer's importance, and all of that."""

    factors: Factors
    elements: int
    share: float
    layer_importance: float


def shapes_of(share: float) -> list[Factors]:
    """Pairs of factors whose product is `share` (1/64: all rows and 1/64 of the columns, 1/2 and 1/32, ... 1/64 and all)."""
    shapes, rows = [], 1.0
    while rows >= share * 0.999:
        shapes.append((rows, min(1.0, share / rows)))
        rows /= 2
    return shapes


def measure(
    losia: LoSiA, batches: Batches, candidates: Sequence[Factors], compute_loss: Loss | None = None
) -> dict[str, list[Captured]]:
    """Layer name -> what each candidate would capture there, by the greedy search over calibration batches. Nothing moves.

    Called by all ranks, with equally many micro-batches on each, and the same on each; before training, like `LoSiA.locate`.
    Two passes over the batches serve all candidates. A candidate that leaves a layer no row or column is left out there; the
    output layer is not measured.

    Raises:
        ConfigError: a layer that every candidate leaves no row or column, and what `LoSiA.locate` refuses.
    """

    def sizes(shape: tuple[int, int]) -> list[tuple[Factors, tuple[int, int]]]:
        kept = [(pair, (subnet_size(shape[0], pair[0]), subnet_size(shape[1], pair[1]))) for pair in candidates]
        possible = [(pair, size) for pair, size in kept if min(size) > 0]
        if not possible:
            raise ConfigError(
                f"a layer of {shape[0]} x {shape[1]} keeps no row or no column under any shape of {list(candidates)}: give a "
                "larger rank_factor, or leave the layer out of target_modules."
            )
        return possible

    def search_of(site: Site) -> Generator[Query, Sums, list[Choice]]:
        shape = site.shape
        return together([greedy(shape, size) for _, size in sizes(shape)])

    importance = (losia.config.located or Located()).importance
    found, _ = run_searches(losia.model, losia.parts, importance, search_of, batches, compute_loss)
    measured: dict[str, list[Captured]] = {}
    for one in found:
        if one.site.is_output:
            continue
        choices: list[Choice] = one.result
        measured[one.site.name] = [
            Captured(pair, r * c, choice.inside.item() / max(choice.total.item(), 1e-300), choice.total.item())
            for (pair, (r, c)), choice in zip(sizes(one.shape), choices, strict=True)
        ]
    return measured


def best_shapes(measured: dict[str, list[Captured]]) -> dict[str, Factors]:
    """Layer name -> the candidate that captures most; meant for candidates of about equal size."""
    return {name: max(found, key=lambda one: one.share).factors for name, found in measured.items()}


def allocate(measured: dict[str, list[Captured]], elements: int) -> dict[str, Factors]:
    """Layer name -> factors, so that subnets of at most `elements` values in all capture much importance.

    Every layer begins with its smallest candidate; then the growth that captures most for a value more is made, again and
    again, while the budget lasts.

    Raises:
        ConfigError: the smallest candidates are more than the budget.
    """
    steps = {name: _worthwhile(found) for name, found in measured.items()}
    place = dict.fromkeys(steps, 0)
    left = elements - sum(found[0].elements for found in steps.values())
    if left < 0:
        raise ConfigError(
            f"a budget of {elements:,} values is less than the smallest candidates' {elements - left:,}: raise it, or give "
            "smaller candidates."
        )
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        at = place[name]
        if at + 1 < len(steps[name]):
            here, there = steps[name][at], steps[name][at + 1]
            gain = (there.share - here.share) * here.layer_importance / (there.elements - here.elements)
            heapq.heappush(heap, (-gain, name))

    for name in steps:
        offer(name)
    while heap:
        _, name = heapq.heappop(heap)
        cost = steps[name][place[name] + 1].elements - steps[name][place[name]].elements
        if cost <= left:
            left -= cost
            place[name] += 1
            offer(name)
    return {name: steps[name][at].factors for name, at in place.items()}


def _worthwhile(found: list[Captured]) -> list[Captured]:
    """Candidates by size, without those that capture no more than a smaller one."""
    kept: list[Captured] = []
    for one in sorted(found, key=lambda one: (one.elements, -one.share)):
        if not kept or (one.elements > kept[-1].elements and one.share > kept[-1].share):
            kept.append(one)
    return kept


def by_kind(measured: dict[str, list[Captured]]) -> dict[str, list[Captured]]:
    """Last part of the layers' names (q_proj, ...) -> means over layers that end so; what some of them lack is left out."""
    kinds: dict[str, list[list[Captured]]] = {}
    for name, found in measured.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(found)
    means: dict[str, list[Captured]] = {}
    for kind, sites in kinds.items():
        by_factors = [{one.factors: one for one in found} for found in sites]
        common = [one.factors for one in sites[0] if all(one.factors in found for found in by_factors)]
        means[kind] = []
        for factors in common:
            ones = [found[factors] for found in by_factors]
            importance = sum(one.layer_importance for one in ones)
            inside = sum(one.share * one.layer_importance for one in ones)
            means[kind].append(
                Captured(factors, sum(one.elements for one in ones), inside / max(importance, 1e-300), importance)
            )
    return means
