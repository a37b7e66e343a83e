"""`RunParts`: what of a run all its checks and moves work on."""

from __future__ import annotations

from dataclasses import dataclass

from losia_dist.localization.collectives import RowCollectives
from losia_dist.sharding.interface import ParameterAccess, StateAccess
from losia_dist.subnet.site import Site


@dataclass(frozen=True)
class RunParts:
    """The layers of one run, and what reaches their values and the other ranks.

    layers: all layers with a subnet, in the model's order.
    parameters: access to the model's parameters, of `resolve_parameters`.
    state: access to the optimizer's state, of `resolve_state`.
    collectives: over all ranks of the run.
    """

    sites: list[Site]
    parameters: ParameterAccess
    state: StateAccess
    collectives: RowCollectives
