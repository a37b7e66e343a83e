"""What subnets leave beside a quantized base, over a whole run: it grows with every cycle, up to a difference of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from losia_dist.digits import short
from losia_dist.formulas import cycle_steps
from losia_dist.tools.plan.memory import plan_memory
from losia_dist.tools.plan.quantized import overlay_bytes
from losia_dist.tools.plan.workload import GB, Workload


@dataclass(frozen=True)
class OverlayGrowth:
    """Bytes of one GPU: after one cycle, at most, and after this run's cycles, if its length is known.

    cycle: optimizer steps of one. cycles: of the run, the one that it ends in counted whole; None: its length is not known.
    most_cycles: after which it grows no more. fitting_cycles: how many fit a GPU; None: any number.
    """

    one_cycle: int
    most: int
    of_run: int | None
    cycle: int
    cycles: int | None
    most_cycles: int
    fitting_cycles: int | None

    @property
    def outgrows(self) -> bool:
        """Whether one cycle fits and the run does not; of a run of unknown length, one that is long enough."""
        fitting = self.fitting_cycles
        return fitting is not None and 0 < fitting < (self.most_cycles if self.cycles is None else self.cycles)

    def record(self) -> dict[str, Any]:
        return {**vars(self), "outgrows": self.outgrows}

    def describe(self) -> str:
        """One sentence, and one of warning where the memory does not last."""
        text = f"What subnets leave beside the codes: {short(self.one_cycle / GB)} GB a GPU after one cycle"
        if self.of_run is not None:
            text += f", {short(self.of_run / GB)} GB after this run's {self.cycles:,}"
        text += f", at most {short(self.most / GB)} GB (from cycle {self.most_cycles} on)."
        if self.outgrows:
            assert self.fitting_cycles is not None
            text += (
                f"\nWARNING: it fits for {self.fitting_cycles:,} cycle{'s' if self.fitting_cycles > 1 else ''} "
                f"({self.fitting_cycles * self.cycle:,} steps), and then no more: set retired: stochastic, which keeps "
                "nothing, or train fewer steps."
            )
        return text


def overlay_growth(workload: Workload, steps: int | None, peak: int) -> OverlayGrowth | None:
    """None where nothing is left beside codes.

    Args:
        steps: of the run. peak: bytes of one GPU with one cycle, without the reserve.
    """
    if not overlay_bytes(workload):
        return None
    config, found = workload.config, plan_memory(workload).peak
    ranks = workload.data_ranks if config.by_rank else 1
    cycle = cycle_steps(workload.groups, config.period, workload.layers_per_slot * ranks)
    weights = [weight for _, layer in workload.shape.kinds for weight in layer.weights]
    most_cycles = max(ceil(weight.m * weight.n / prod(workload.subnet(weight.m, weight.n))) for weight in weights)
    cycles = None if steps is None else max(1, ceil(steps / cycle))

    def fits(count: int) -> bool:
        grown = peak + plan_memory(workload, count).peak - found
        return grown + workload.cluster.reserve <= workload.cluster.memory

    fitting = None
    if not fits(most_cycles):
        fitting, beyond = 0, most_cycles  # the first number that does not fit lies behind the one, and not behind the other
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    of_run = None if cycles is None else overlay_bytes(workload, cycles)
    return OverlayGrowth(
        overlay_bytes(workload), overlay_bytes(workload, most_cycles), of_run, cycle, cycles, most_cycles, fitting
    )
