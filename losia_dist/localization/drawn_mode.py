"""`Drawn`: a slot ends with subnets drawn anew. No importance is collected, and nothing is sent."""

from __future__ import annotations

from losia_dist.localization.accumulator import ImportanceAccumulator
from losia_dist.localization.search import Choice
from losia_dist.localization.slots import SlotGroup, Wanted
from losia_dist.subnet.drawn import draw_subnets
from losia_dist.subnet.site import Site


class DrawnLocalization:
    """Draws every subnet from the seed, the layer's name and the step, equally on every rank.

    seed: of the configuration.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def groups_per_slot(self, layers_per_slot: int) -> int:
        return layers_per_slot

    def accumulator(self, group: SlotGroup, site: Site) -> None:
        return None

    def choose(self, group: SlotGroup, accumulator: ImportanceAccumulator | None, wanted: Wanted) -> Choice:
        drawn = draw_subnets(wanted.names, wanted.shape, wanted.kept, self.seed, wanted.step, wanted.left_out)
        rows, columns = (index.view(present.shape) for index, present in zip(drawn, wanted.present, strict=True))
        return Choice.unmeasured(rows.to(wanted.device), columns.to(wanted.device))
