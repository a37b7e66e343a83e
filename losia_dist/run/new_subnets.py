"""The subnets that a group's layers get at a slot's end: layer by layer, or together where layers share columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from losia_dist.localization.accumulator import ImportanceAccumulator
from losia_dist.localization.modes import Localization
from losia_dist.localization.search import Choice
from losia_dist.localization.slots import SlotGroup, Wanted
from losia_dist.subnet.site import Site


def choose_group(
    localization: Localization,
    group: SlotGroup,
    wanted: Mapping[Site, Wanted],
    accumulators: dict[Site, ImportanceAccumulator],
    together: Sequence[Sequence[Site]],
) -> list[Choice]:
    """A choice for each layer of the group, in the order of `wanted`. Called by all ranks; nothing is moved.

    accumulators: of the slot; those of the group are taken out, each let go as soon as it was used. together: the layers, those
    that share columns in one list.
    """
    found: dict[Site, Choice] = {}
    for family in together:
        # Nothing is held beyond the averages: a score takes the place of one of them.
        taken = [accumulators.pop(site, None) for site in family]
        chosen = localization.choose(group, taken, [wanted[site] for site in family])
        found.update(zip(family, chosen, strict=True))
    return [found[site] for site in wanted]
