"""`RunParts`: what of a run all its checks and moves work on."""

from __future__ import annotations

from dataclasses import dataclass, field

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.modes import Localization, make_localization
from losia_dist.ranks.agreement import Agreement
from losia_dist.sharding.expert_parallel import replica_group
from losia_dist.sharding.interface import ParameterAccess, StateAccess
from losia_dist.subnet.site import Site


@dataclass(frozen=True)
class RunParts:
    """The layers of one run, and what reaches their values and the other ranks.

    layers: all layers with a subnet, in the model's order.
    parameters: access to the model's parameters, of `resolve_parameters`.
    state: access to the optimizer's state, of `resolve_state`.
    collectives: over all ranks of the run.
    sequence: over the ranks that share each sequence with this one, which are neighbours; this rank alone, mostly.
    """

    sites: list[Site]
    parameters: ParameterAccess
    state: StateAccess
    collectives: RowCollectives
    sequence: RowCollectives = field(default_factory=RowCollectives)

    @property
    def data_ranks(self) -> int:
        """How many batches are computed at a time: ranks that see different data."""
        return self.collectives.world_size // self.sequence.world_size


def localization_of(parts: RunParts, config: LoSiAConfig, agreement: Agreement) -> Localization:
    """Who localizes what in this run; called by all ranks, which make process groups where experts are spread over them."""
    group, is_spread = replica_group(parts.sites, agreement)
    replicas = RowCollectives(group, parts.collectives.world_size) if is_spread else None
    # A quantized weight is made dense for a moment.
    resident = parts.parameters.weight_is_resident and all(site.packed is None for site in parts.sites)
    return make_localization(config, parts.collectives, weight_is_resident=resident, replicas=replicas, sequence=parts.sequence)
