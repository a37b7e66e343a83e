"""Who localizes what in a time slot: all ranks each layer together ("reduced"), or every rank a layer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from losia_dist.localization.accumulator import ImportanceAccumulator
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.selection import select_greedy

Choice = tuple[Tensor, Tensor, Tensor]  # rows R, columns C (int64, sorted), objective (float64 scalar)


@dataclass
class SlotGroup:
    """A group's place among those that localize in one slot; in "rank_parallel" it names the rank that works at it."""

    name: str
    place: int


class Localization(Protocol):
    """Hands out accumulators at the start of a slot and makes choices at its end. Used by all ranks in the same order."""

    def groups_per_slot(self, layers_per_slot: int) -> int:
        """Groups that localize in one slot, over all ranks."""
        ...

    def accumulator(self, group: SlotGroup, shape: tuple[int, int], device: torch.device) -> ImportanceAccumulator | None:
        """What collects the importance of a layer of this group on this rank, or None if this rank does not."""
        ...

    def choose(
        self,
        group: SlotGroup,
        accumulator: ImportanceAccumulator | None,
        shape: tuple[int, int],
        kept: tuple[int, int],
        device: torch.device,
    ) -> Choice:
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

    def accumulator(self, group: SlotGroup, shape: tuple[int, int], device: torch.device) -> ImportanceAccumulator | None:
        return ImportanceAccumulator(shape, device=device, collectives=self.collectives, **self.settings)

    def choose(
        self,
        group: SlotGroup,
        accumulator: ImportanceAccumulator | None,
        shape: tuple[int, int],
        kept: tuple[int, int],
        device: torch.device,
    ) -> Choice:
        assert accumulator is not None
        return select_greedy(accumulator.score(), shape, kept, self.collectives)


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

    def accumulator(self, group: SlotGroup, shape: tuple[int, int], device: torch.device) -> ImportanceAccumulator | None:
        if self._owner(group) != self.collectives.rank:
            return None
        return ImportanceAccumulator(shape, device=device, collectives=self.alone, **self.settings)

    def choose(
        self,
        group: SlotGroup,
        accumulator: ImportanceAccumulator | None,
        shape: tuple[int, int],
        kept: tuple[int, int],
        device: torch.device,
    ) -> Choice:
        row_count, column_count = kept
        if accumulator is not None:
            rows, columns, objective = select_greedy(accumulator.score(), shape, kept, self.alone)
            packed = torch.cat([rows.to(torch.float64), columns.to(torch.float64), objective.reshape(1)])
        else:
            packed = torch.empty(row_count + column_count + 1, dtype=torch.float64, device=device)
        packed = self.collectives.broadcast(packed, self._owner(group))  # float64 holds every index exactly
        rows, columns, objective = packed.split([row_count, column_count, 1])
        return rows.to(torch.int64), columns.to(torch.int64), objective.reshape(())

    def _owner(self, group: SlotGroup) -> int:
        return group.place % self.collectives.world_size


LOCALIZATIONS: dict[str, type[ReducedLocalization] | type[RankParallelLocalization]] = {
    "reduced": ReducedLocalization,
    "rank_parallel": RankParallelLocalization,
}
