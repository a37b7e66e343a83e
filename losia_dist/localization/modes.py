"""Who localizes what in a time slot: all ranks each layer together ("reduced"), or every rank a layer of its own; or nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.localization.accumulator import Accumulators, ImportanceAccumulator
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.drawn_mode import DrawnLocalization
from losia_dist.localization.search import Choice, greedy, keep_without_signal
from losia_dist.localization.sharded_choice import select
from losia_dist.localization.slots import SlotGroup, Wanted
from losia_dist.subnet.drawn import Draw
from losia_dist.subnet.site import Site


class Localization(Protocol):
    """Hands out accumulators at the start of a slot and makes choices at its end. Used by all ranks in the same order."""

    def groups_per_slot(self, layers_per_slot: int) -> int:
        """Groups that localize in one slot, over all ranks."""
        ...

    def accumulator(self, group: SlotGroup, site: Site) -> ImportanceAccumulator | None:
        """What collects the importance of a layer of this group on this rank, or None if this rank does not."""
        ...

    def choose(self, group: SlotGroup, accumulators: Accumulators, wanted: Sequence[Wanted]) -> list[Choice]:
        """The new subnet of a layer of this group, or those of layers that share columns, equal on every rank."""
        ...


class ReducedLocalization:
    """Importance from the gradient of the global batch: each rank keeps a block of rows of every localizing layer.

    replicas: where experts are spread over ranks, over those that compute with the same as this one; a gradient is the mean
    over all ranks there too. settings: what `ImportanceAccumulator` takes besides shape, device and collectives.
    """

    def __init__(self, collectives: RowCollectives, replicas: RowCollectives | None = None, **settings: Any) -> None:
        self.collectives, self.replicas, self.settings = collectives, replicas, settings

    def groups_per_slot(self, layers_per_slot: int) -> int:
        return layers_per_slot

    def accumulator(self, group: SlotGroup, site: Site) -> ImportanceAccumulator | None:
        collectives = self.collectives
        if site.held is not None:
            assert self.replicas is not None
            collectives = self.replicas
        return _accumulator_of(site, collectives, self.settings)

    def choose(self, group: SlotGroup, accumulators: Accumulators, wanted: Sequence[Wanted]) -> list[Choice]:
        chosen = _chosen(accumulators, wanted)
        for place, one in enumerate(wanted):
            if one.held is not None:
                chosen[place] = self._of_all_experts(chosen[place], one, one.held)
        return keep_without_signal(chosen, [one.present for one in wanted])

    def _of_all_experts(self, mine: Choice, wanted: Wanted, held: tuple[int, int]) -> Choice:
        """The choices of all X experts, from those of each rank's own: X (r + c + 2) numbers are all-reduced."""
        assert self.replicas is not None
        X, (r, c) = wanted.count, wanted.kept
        packed = torch.zeros(X, r + c + 2, dtype=torch.float64, device=wanted.device)
        if self.replicas.rank == 0:  # of those that chose the same, one speaks
            parts = [part.to(torch.float64).reshape(held[1] - held[0], -1) for part in mine]
            packed[held[0] : held[1]] = torch.cat(parts, dim=1)
        packed = self.collectives.sum_columns(packed)  # zeros but for one rank; float64 holds every index exactly
        rows, columns, inside, total = packed.split([r, c, 1, 1], dim=1)
        return Choice(rows.to(torch.int64), columns.to(torch.int64), inside.squeeze(1), total.squeeze(1))


class RankParallelLocalization:
    """Each rank localizes groups of its own from its own batches: no gradient is communicated, only the chosen indices.

    With N ranks, N times as many groups are re-localized per slot at the same work per rank; the score is not sharded (one
    rank holds all rows of its layers), and rests on 1/N of the data. Where ranks share sequences, each of the N is such a
    group of neighbouring ranks: they average a gradient among themselves, and share the score's rows.

    sequence: over the ranks that share each sequence with this one.
    """

    def __init__(self, collectives: RowCollectives, sequence: RowCollectives | None = None, **settings: Any) -> None:
        self.collectives, self.settings = collectives, settings
        self.alone = sequence or RowCollectives(None)
        self.owners = collectives.world_size // self.alone.world_size

    def groups_per_slot(self, layers_per_slot: int) -> int:
        return layers_per_slot * self.owners

    def accumulator(self, group: SlotGroup, site: Site) -> ImportanceAccumulator | None:
        if self._owner(group) != self.collectives.rank // self.alone.world_size:
            return None
        return _accumulator_of(site, self.alone, self.settings)

    def choose(self, group: SlotGroup, accumulators: Accumulators, wanted: Sequence[Wanted]) -> list[Choice]:
        chosen: Sequence[Choice | None] = [None] * len(wanted)
        if accumulators[0] is not None:  # a group's layers are all of one rank
            chosen = keep_without_signal(_chosen(accumulators, wanted), [one.present for one in wanted])
        return [self._from_owner(group, mine, one) for mine, one in zip(chosen, wanted, strict=True)]

    def _from_owner(self, group: SlotGroup, mine: Choice | None, wanted: Wanted) -> Choice:
        """The choice of the rank that works at the group, on every rank: X (r + c + 2) numbers are broadcast."""
        if mine is not None:
            packed = torch.cat([part.to(torch.float64).reshape(-1) for part in mine])
        else:
            numbers = wanted.count * (sum(wanted.kept) + 2)
            packed = torch.empty(numbers, dtype=torch.float64, device=wanted.device)
        speaker = self._owner(group) * self.alone.world_size
        packed = self.collectives.broadcast(packed, speaker)  # float64 holds every index exactly
        X, (r, c), each = wanted.count, wanted.kept, wanted.present[0].shape[:-1]
        rows, columns, inside, total = packed.split([X * r, X * c, X, X])
        indices = rows.to(torch.int64).view(*each, r), columns.to(torch.int64).view(*each, c)
        return Choice(*indices, inside.view(each), total.view(each))

    def _owner(self, group: SlotGroup) -> int:
        return group.place % self.owners


def _chosen(accumulators: Accumulators, wanted: Sequence[Wanted]) -> list[Choice]:
    """By the scores, which are used up; called by all ranks that share their rows."""
    mine = [one for one in accumulators if one is not None]
    search = greedy([(one.shape, one.kept) for one in wanted])
    return select(search, [one.score() for one in mine], [one.rows for one in mine], mine[0].collectives)


def _accumulator_of(site: Site, collectives: RowCollectives, settings: dict[str, Any]) -> ImportanceAccumulator:
    """Of the matrices that this rank computes with."""
    device, count = site.row_index.device, site.here.count
    return ImportanceAccumulator(
        site.shape, device=device, collectives=collectives, count=count, first=site.first_here, **settings
    )


def make_localization(
    config: LoSiAConfig,
    collectives: RowCollectives,
    *,
    weight_is_resident: bool,
    replicas: RowCollectives | None = None,
    sequence: RowCollectives | None = None,
) -> Localization:
    """What the configuration asks for, over the ranks of the collectives.

    replicas: as `ReducedLocalization` takes it; there is no such form of reduction="by_rank".
    sequence: as `RankParallelLocalization` takes it; importance that all ranks take together is of the mean over all of them.
    """
    located = config.located
    if located is None:
        return DrawnLocalization(Draw.of(config))
    settings: Any = {"importance": located.importance, "betas": located.betas, "weight_is_resident": weight_is_resident}
    if config.by_rank:
        return RankParallelLocalization(collectives, sequence, **settings)
    return ReducedLocalization(collectives, replicas, **settings)
