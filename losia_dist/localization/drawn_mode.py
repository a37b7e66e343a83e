"""`Drawn`: a slot ends with subnets drawn anew. No importance is collected, and nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence

from losia_dist.localization.accumulator import Accumulators
from losia_dist.localization.search import Choice
from losia_dist.localization.slots import SlotGroup, Wanted
from losia_dist.subnet.drawn import Draw
from losia_dist.subnet.site import Site


class DrawnLocalization:
    """Draws every subnet from the seed, the layer's name and the step, equally on every rank.

    draw: of the run.
    """

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def groups_per_slot(self, layers_per_slot: int) -> int:
        return layers_per_slot

    def accumulator(self, group: SlotGroup, site: Site) -> None:
        return None

    def choose(self, group: SlotGroup, accumulators: Accumulators, wanted: Sequence[Wanted]) -> list[Choice]:
        return [self._drawn(one) for one in wanted]

    def _drawn(self, wanted: Wanted) -> Choice:
        drawn = self._draw.subnets(
            wanted.names, wanted.shape, wanted.kept, wanted.step, wanted.left_out, linear=wanted.of_linear
        )
        rows, columns = (index.view(present.shape) for index, present in zip(drawn, wanted.present, strict=True))
        return Choice.unmeasured(rows.to(wanted.device), columns.to(wanted.device))
