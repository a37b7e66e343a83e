"""A step by gradients that are infinite, or not a number, ends the run on every rank before anything is saved from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losia_dist.errors import DivergenceError
from losia_dist.localization.collectives import RowCollectives
from losia_dist.optim.adamw import local_part
from losia_dist.subnet.copied import changed_copy
from losia_dist.subnet.groups import GROUP_KEY


class FiniteCheck:
    """Looks at the gradients that the optimizer was just stepped by, group by group, wherever an engine keeps them.

    At gradients, since ZeRO-3 pads what it steps with memory that nobody wrote. The norm of each group stays on the device.
    `end_step` lets the ranks agree on it (one number a group) and reads what was agreed on the step before, which is there by
    then: the host waits for nothing. `read_latest` reads at once. On the CPU both do.

    Args:
        optimizer: the one whose `step` the engine calls (the inner one under ZeRO, once per group).
        collectives: over all ranks of the run.
        device: where they communicate.
    """

    def __init__(self, optimizer: Optimizer, collectives: RowCollectives, device: torch.device) -> None:
        self._collectives, self._device = collectives, device
        self._names = list(dict.fromkeys(group[GROUP_KEY] for group in optimizer.param_groups))
        self._norms: dict[str | None, Tensor] = {}  # of the step in progress, on this rank
        self._agreed: tuple[int, Tensor, Any] | None = None  # step, flags [groups] on their way to the host, their arrival
        self._found: DivergenceError | None = None  # stays: whoever goes on after the error must not save what it left
        self._handle = optimizer.register_step_post_hook(self._look)

    def remove(self) -> None:
        """Leave the optimizer as it was found."""
        self._handle.remove()

    def end_step(self, step: int, copies_changed: bool = False) -> None:
        """Called by all ranks after each optimizer step, which is number `step`, from 1.

        copies_changed: of this rank's (`subnet.copied`); all ranks learn of it on the way.

        Raises:
            UnsupportedError: some rank's copies were. Same on every rank.
            DivergenceError: gradients of this step (on a GPU: of the one before) were not finite. Same on every rank.
        """
        before, self._agreed = self._agreed, self._agree(step, copies_changed)
        self._norms = {}
        if self._device.type == "cpu":
            self.read_latest()
        else:
            self._read(before)

    def read_latest(self) -> None:
        """Read what was agreed on the latest step; called by all ranks, before anything is made of the values that it left.

        Raises:
            DivergenceError: as `end_step`, of the latest step; of any step before it, until `forget`.
        """
        if self._found is not None:
            raise self._found
        agreed, self._agreed = self._agreed, None
        self._read(agreed)

    def forget(self) -> None:
        """The values that the steps so far have left are gone: others were loaded."""
        self._norms, self._agreed, self._found = {}, None, None

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            gradients = [local_part(p.grad) for p in group["params"] if p.grad is not None]
            gradients = [gradient for gradient in gradients if gradient.numel()]
            if not gradients:
                continue
            norm = _largest(gradients)
            known = self._norms.get(group[GROUP_KEY])
            self._norms[group[GROUP_KEY]] = norm if known is None else torch.maximum(known, norm)

    def _agree(self, step: int, copies_changed: bool) -> tuple[int, Tensor, Any]:
        nothing = torch.zeros((), device=self._device)
        found = [self._norms.get(name, nothing).to(self._device, torch.float32, non_blocking=True) for name in self._names]
        found.append(torch.full((), math.inf if copies_changed else 0.0, device=self._device))
        # As flags: a maximum over ranks may lose a NaN.
        flags = self._collectives.largest((~torch.isfinite(torch.stack(found))).to(torch.int32))
        if self._device.type == "cpu":
            return step, flags, None
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return step, host, ready

    def _read(self, agreed: tuple[int, Tensor, Any] | None) -> None:
        if agreed is None:
            return
        step, flags, ready = agreed
        if ready is not None:
            ready.synchronize()
        *found, copies_changed = flags.tolist()
        bad = [name or "what trains in full" for name, flag in zip(self._names, found, strict=True) if flag]
        if bad:
            named = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more groups" if len(bad) > 5 else "")
            self._found = _not_finite(f"the gradients of {named}", step)
            raise self._found
        if copies_changed:
            raise changed_copy(f"seen after step {step}, of this rank or another")


def _largest(gradients: list[Tensor]) -> Tensor:
    """Largest magnitude among them, scalar; NaN is above all. One pass over memory, and the host does not wait.

    Not a sum of squares, which would overflow by finite gradients.
    """
    if gradients[0].device.type == "cpu":  # a norm takes seventeen times as long there
        return torch.stack([end for gradient in gradients for end in torch.aminmax(gradient)]).abs().max()
    return torch.stack(torch._foreach_norm(gradients, float("inf"))).max()


def refuse_skipped(step: int) -> None:
    """DeepSpeed left step number `step` out, for gradients that are not finite; it would leave out all others like it too,
    and a run could end that has learned nothing. Called by all ranks, which have agreed on it.

    Raises:
        DivergenceError: always.
    """
    raise _not_finite("gradients", step, "DeepSpeed left the step out, ")


def _not_finite(what: str, step: int, done: str = "") -> DivergenceError:
    return DivergenceError(
        f"{what} were infinite or not a number in step {step}; {done}nothing has been saved since. Causes seen: a learning "
        "rate that is too large; a loss that divides by a count of zero, or overflows. Look at that step's batch, lower the "
        "learning rate or clip the gradients, and resume from the latest checkpoint."
    )
