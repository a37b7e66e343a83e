"""Time slots: which groups localize at an optimizer step, and how far each one's learning rate has rewarmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.formulas import ends_slot, localizing_groups, rewarm_scale, slot_of, takes_importance


@dataclass
class SlotGroup:
    """A group's place among those that localize in one slot; with reduction="by_rank" it names the rank that works at it."""

    name: str
    place: int


@dataclass(frozen=True)
class Wanted:
    """A layer that is to get another subnet (experts: others, one each), at a slot's end (or before the first step: step 0).

    names: of its matrices (`Site.matrix_names`). step: optimizer steps done by then. shape: (m, n) of a matrix. present: rows
    [r] and columns [c] of the subnet that it has, sorted int64; of experts [X, r] and [X, c]. left_out: columns that are not
    drawn, by name. held: of experts that are spread over ranks, those [start, stop) that this rank computes with.
    """

    names: Sequence[str]
    step: int
    shape: tuple[int, int]
    present: tuple[Tensor, Tensor]
    left_out: Mapping[str, Sequence[int]] = field(default_factory=dict)
    held: tuple[int, int] | None = None

    @property
    def kept(self) -> tuple[int, int]:
        """(r, c) of the subnet of one matrix."""
        rows, columns = self.present
        return rows.shape[-1], columns.shape[-1]

    @property
    def count(self) -> int:
        """X: matrices; 1 of a linear layer."""
        return len(self.names)

    @property
    def of_linear(self) -> bool:
        """Whether it is a linear layer, not experts."""
        return self.present[0].dim() == 1

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.present[0].device


class SlotClock:
    """Counts optimizer steps; knows nothing of models or ranks.

    Args:
        names: groups in localization order.
        period: steps per slot.
        per_slot: groups that localize in one slot.
        rewarm_steps: steps of a group's ramp after re-localization; 0: none.
        importance_steps: of `Located`.
    """

    def __init__(
        self, names: list[str], period: int, per_slot: int, rewarm_steps: int, importance_steps: int | None = None
    ) -> None:
        self.importance_steps = importance_steps
        self.names, self.period, self.per_slot, self.rewarm_steps = names, period, per_slot, rewarm_steps
        self.step = 0  # optimizer steps done; also the index of the step in progress
        self.relocalized_at: dict[str, int] = {}  # group -> index of its first step on the new subnet

    @classmethod
    def of(cls, config: LoSiAConfig, names: list[str], per_slot: int) -> SlotClock:
        """The clock of a run with these settings."""
        steps = None if config.located is None else config.located.importance_steps
        return cls(names, config.period, per_slot, config.effective_rewarm_steps, steps)

    @property
    def localizing(self) -> list[str]:
        """Groups that accumulate importance during the step in progress."""
        slot = slot_of(self.step, self.period)
        return [self.names[index] for index in localizing_groups(slot, len(self.names), self.per_slot)]

    @property
    def in_last_step(self) -> bool:
        """Whether the step in progress is the last of its slot."""
        return ends_slot(self.step, self.period)

    @property
    def takes_importance(self) -> bool:
        """Whether the groups that localize form full gradients in the step in progress."""
        return takes_importance(self.step, self.period, self.importance_steps)

    def advance(self, relocalized: list[str]) -> None:
        """The step in progress is done; the groups named begin a ramp with the next one."""
        self.step += 1
        for name in relocalized:
            self.relocalized_at[name] = self.step

    def scale(self, name: str) -> float:
        """Learning rate factor of a group in the step in progress."""
        since = self.relocalized_at.get(name)
        return rewarm_scale(None if since is None else self.step - since, self.rewarm_steps)

    def state(self) -> dict[str, Any]:
        """Plain values that `restore` takes back."""
        return {"step": self.step, "relocalized_at": dict(self.relocalized_at)}

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where another clock over the same groups stood."""
        self.step, self.relocalized_at = state["step"], dict(state["relocalized_at"])
