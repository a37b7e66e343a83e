"""Rewarming that composes with any scheduler: a factor on a group's learning rate for the length of one step only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from losia_dist.subnet.groups import GROUP_KEY


class Rewarming:
    """Multiplies each group's scheduled learning rate by its ramp while the optimizer steps, and puts it back after.

    The scheduled value itself is never changed, so schedulers that derive the next rate from the present one (torch's
    chainable ones) are not disturbed. Also counts that the optimizer really stepped.

    Args:
        optimizer: the one whose `step` the engine calls (the inner one under ZeRO).
        scale: group name (None for parameters outside the subnets) -> factor in the step in progress.
    """

    def __init__(self, optimizer: Optimizer, scale: Callable[[str | None], float]) -> None:
        self.scale = scale
        self.stepped = False
        self.allow: Callable[[], None] | None = None  # raises where no step may be made yet
        self.applied: dict[str | None, float] = {}  # learning rate of each group in its latest step
        self._scheduled: list[tuple[dict[str, Any], float]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Leave the optimizer as it was found."""
        for handle in self._handles:
            handle.remove()

    def restore(self, applied: dict[str | None, float]) -> None:
        """Take over the rates of a resumed run's latest step; no step has been taken since."""
        self.applied, self.stepped = dict(applied), False

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.allow is not None:
            self.allow()
        self._scheduled = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, lr in self._scheduled:
            group["lr"] = self.applied[group[GROUP_KEY]] = lr * self.scale(group[GROUP_KEY])

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, lr in self._scheduled:
            group["lr"] = lr
        self._scheduled = []
        self.stepped = True
