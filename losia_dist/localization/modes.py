"""Who localizes what in a time slot: all ranks each layer together ("reduced"), or every rank a layer of its own; or nobody."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.localization.accumulator import ImportanceAccumulator
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.drawn_mode import DrawnLocalization
from losia_dist.localization.search import Choice, greedy, keep_without_signal
from losia_dist.localization.sharded_choice import select
from losia_dist.localization.slots import SlotGroup, Wanted


class Localization(Protocol):
    """Hands out accumulators at the start of a slot and makes choices at its end. Used by all ranks in the same order."""

    def groups_per_slot(self, layers_per_slot: int) -> int:
        """Groups that localize in one slot, over all ranks."""
        ...

    def accumulator(
        self, group: SlotGroup, shape: tuple[int, int], device: torch.device, count: int = 1
    ) -> ImportanceAccumulator | None:
        """What collects the importance of a layer of this group on this rank, or None if this rank does not.

        shape: (m, n) of a matrix. count: X matrices; 1 for a linear layer.
        """
        ...

    def choose(self, group: SlotGroup, accumulator: ImportanceAccumulator | None, wanted: Wanted) -> Choice:
        """The new subnet of a layer of this group, equal on every rank."""
        ...


class ReducedLocalization:
    """Importance from the gradient of the global batch: each rank keeps a block of rows of every localizing layer.

    settings: what `ImportanceAccumulator` takes besides shape, device and collectives.
    """

    def __init__(self, collectives: RowCollectives, **settings: Any) -> None:
        self.collectives, self.settings = collectives, settings

    def groups_per_slot(self, layers_per_slot: int) -> int:
        return layers_per_slot

    def accumulator(
        self, group: SlotGroup, shape: tuple[int, int], device: torch.device, count: int = 1
    ) -> ImportanceAccumulator | None:
        return ImportanceAccumulator(shape, device=device, collectives=self.collectives, count=count, **self.settings)

    def choose(self, group: SlotGroup, accumulator: ImportanceAccumulator | None, wanted: Wanted) -> Choice:
        assert accumulator is not None
        chosen = select(greedy(wanted.shape, wanted.kept), accumulator.score(), accumulator.rows, self.collectives)
        return keep_without_signal(chosen, wanted.present)


class RankParallelLocalization:
    """Each rank localizes groups of its own from its own batches: no gradient is communicated, only the chosen indices.

    With N ranks, N times as many groups are re-localized per slot at the same work per rank; the score is not sharded (one
    rank holds all rows of its layers), and rests on 1/N of the data.
    """

    def __init__(self, collectives: RowCollectives, **settings: Any) -> None:
        self.collectives, self.settings = collectives, settings
        self.alone = RowCollectives(None)

    def groups_per_slot(self, layers_per_slot: int) -> int:
        return layers_per_slot * self.collectives.world_size

    def accumulator(
        self, group: SlotGroup, shape: tuple[int, int], device: torch.device, count: int = 1
    ) -> ImportanceAccumulator | None:
        if self._owner(group) != self.collectives.rank:
            return None
        return ImportanceAccumulator(shape, device=device, collectives=self.alone, count=count, **self.settings)

    def choose(self, group: SlotGroup, accumulator: ImportanceAccumulator | None, wanted: Wanted) -> Choice:
        if accumulator is not None:
            chosen = select(greedy(wanted.shape, wanted.kept), accumulator.score(), accumulator.rows, self.alone)
            chosen = keep_without_signal(chosen, wanted.present)
            packed = torch.cat([part.to(torch.float64).reshape(-1) for part in chosen])
        else:
            numbers = wanted.count * (sum(wanted.kept) + 2)
            packed = torch.empty(numbers, dtype=torch.float64, device=wanted.device)
        packed = self.collectives.broadcast(packed, self._owner(group))  # float64 holds every index exactly
        X, (r, c), each = wanted.count, wanted.kept, wanted.present[0].shape[:-1]
        rows, columns, inside, total = packed.split([X * r, X * c, X, X])
        indices = rows.to(torch.int64).view(*each, r), columns.to(torch.int64).view(*each, c)
        return Choice(*indices, inside.view(each), total.view(each))

    def _owner(self, group: SlotGroup) -> int:
        return group.place % self.collectives.world_size


def make_localization(config: LoSiAConfig, collectives: RowCollectives, *, weight_is_resident: bool) -> Localization:
    """What the configuration asks for, over the ranks of the collectives."""
    located = config.located
    if located is None:
        return DrawnLocalization(config.seed)
    mode = RankParallelLocalization if config.by_rank else ReducedLocalization
    return mode(collectives, importance=located.importance, betas=located.betas, weight_is_resident=weight_is_resident)
