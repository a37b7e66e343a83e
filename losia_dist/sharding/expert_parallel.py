"""Experts that Transformers' expert parallelism spreads over ranks, beside FSDP2: who computes with which; what is refused.

A weight [E, m, n] is a DTensor on a mesh of its own, with a dimension "ep": each rank of it computes with E / ep_size experts,
and the other dimensions ("efsdp", "dp_replicate") are of ranks that compute with the same. Every other parameter lies on the
mesh of FSDP2 alone. Tokens travel to their experts' ranks, so that the gradient that a rank forms for its experts is the sum
over its whole "ep" group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import UnsupportedError, some
from losia_dist.ranks.agreement import Agreement
from losia_dist.subnet.experts import SubnetExperts, SubnetWeights, hold_experts
from losia_dist.subnet.site import Site

EP = "ep"  # what Transformers calls the dimension of the mesh
CONVERT_FIRST = "Load the model with losia_dist.load_distributed_model(directory, config, distributed_config)"


def is_spread(parameter: Tensor) -> bool:
    """Whether this is a parameter of experts that are spread over ranks."""
    mesh = getattr(parameter, "device_mesh", None)  # of a DTensor, whose class is not loaded where nothing is distributed
    return EP in (getattr(mesh, "mesh_dim_names", None) or ())


def note_held_experts(model: nn.Module) -> None:
    """Tell every module of experts with subnets which of them this rank computes with. No communication."""
    for module in model.modules():
        if isinstance(module, SubnetWeights) and module.sites and is_spread(module.sites[0].weight):
            weight: Any = module.sites[0].weight
            ranks, place = _ep_place(weight)
            count = weight.shape[0] // ranks
            hold_experts(module, place * count, (place + 1) * count)


def check_parallelism(settings: Any) -> None:
    """Refuse what a `DistributedConfig` asks for beside FSDP2 and expert parallelism. No communication.

    settings: the `DistributedConfig`, or None.

    Raises:
        UnsupportedError: tensor or pipeline parallelism.
    """
    for name, kind in (("tp_size", "tensor"), ("pp_size", "pipeline")):
        size = getattr(settings, name, None) or 1
        if size > 1:
            raise UnsupportedError(
                f"DistributedConfig({name}={size}): LoSiA does not train under {kind} parallelism. Leave {name} out; "
                "fsdp_size, dp_replicate_size and ep_size are supported."
            )


def check_config(config: LoSiAConfig) -> None:
    """Refuse what a configuration asks for that experts spread over ranks do not have. No communication.

    Raises:
        UnsupportedError: as named.
    """
    why = None
    if config.by_rank:
        why = "reduction='by_rank' gives each rank layers of its own, and none sees all experts of one: use reduction='reduced'"
    elif config.needs_calibration:
        asked = "start='importance'" if config.outlier_limit is None else f"outlier_limit={config.outlier_limit}"
        why = f"{asked} is measured by micro-batch, and an expert sees those of several ranks at once: leave it out"
    if why is not None:
        raise UnsupportedError(f"with expert parallelism (ep_size): {why}.")


def check_experts(sites: list[Site], ep_size: int) -> None:
    """Refuse experts that cannot be spread over so many ranks, before they are. No communication.

    Raises:
        UnsupportedError: a count that ep_size does not divide, experts that localize in parts, or of a kind without a plan.
    """
    for site in sites:
        if site.experts is None:
            continue
        count = site.layout.number_of_experts(tuple(site.weight.shape))
        if not isinstance(site.module, SubnetExperts):
            raise UnsupportedError(
                f"ep_size={ep_size}: the experts of {site.name} ({type(site.module).__name__}) have no expert parallelism in "
                "Transformers. Use fsdp_size alone."
            )
        if count % ep_size:
            raise UnsupportedError(
                f"ep_size={ep_size} does not divide the {count} experts of {site.name}: every rank computes with equally many. "
                "Choose an ep_size that does."
            )
        if site.layout.count != count:
            raise UnsupportedError(
                f"ep_size={ep_size}: {site.name} localizes apart from the other experts of its layer, and every part would "
                f"have to be spread over all ranks. Set experts_per_slot={count}, or draw subnets (selection=Drawn())."
            )


def expert_plan(sites: list[Site], plan: dict[str, str], generic: Any) -> dict[str, str]:
    """Rules of an expert-parallel plan for subnets: each that of its weight.

    plan: the model's, by names with `*` for layer numbers. generic: full name -> such a name.

    Raises:
        UnsupportedError: experts that the plan leaves whole.
    """
    found = {}
    for site in sites:
        if site.experts is None:
            continue
        module, _, _ = site.name.rpartition(".")
        rule = plan.get(generic(site.name))
        if rule is None or plan.get(generic(module)) != "ep_dispatch_experts":
            raise UnsupportedError(
                f"the model's expert-parallel plan has no rule for {site.name}, or none that brings its experts their tokens "
                "('ep_dispatch_experts'): without them every rank would train experts of its own. Use fsdp_size alone."
            )
        found[generic(f"{module}.{site.names.subnet}")] = rule
    return found


def replica_group(sites: list[Site], agreement: Agreement, config: LoSiAConfig) -> tuple[dist.ProcessGroup | None, bool]:
    """Ranks that compute with the same experts as this one (None: it alone), and whether experts are spread over ranks at all.

    Called by all ranks of the run; makes process groups.

    Raises:
        UnsupportedError: experts that were spread before the model was converted, other ranks than those of the mesh, or a
            configuration that this does not go with. Same on every rank.
    """
    spread = [site for site in sites if is_spread(site.weight)]
    if not spread:
        return None, False
    check_config(config)
    late = [site.name for site in spread if site.held is None or not is_spread(site.subnet)]
    if late:
        raise UnsupportedError(f"the experts of {some(late)} were spread over ranks before they got subnets. {CONVERT_FIRST}.")
    mesh = _mesh(spread[0].weight)
    mine: list[int] = sorted(mesh.mesh.select(_dimension(mesh), mesh.get_local_rank(EP)).flatten().tolist())
    everyone = agreement.gather(mine)
    if sorted({rank for ranks in everyone for rank in ranks}) != list(range(dist.get_world_size())) or (
        agreement.world_size != dist.get_world_size()
    ):
        raise UnsupportedError("with expert parallelism all ranks train one model: leave process_group out.")
    group = None
    for ranks in sorted({tuple(ranks) for ranks in everyone}):
        made = dist.new_group(list(ranks)) if len(ranks) > 1 else None  # by all ranks, in one order
        if list(ranks) == mine:
            group = made
    return group, True


@contextmanager
def whole_for_saving(model: Any) -> Iterator[None]:
    """In here `save_pretrained` writes the whole weights that one rank gives it, and does not gather them over all ranks."""
    config: Any = getattr(model, "config", None)
    asked = getattr(config, "distributed_config", None)
    if asked is None:
        yield
        return
    config.distributed_config = None
    try:
        yield
    finally:
        config.distributed_config = asked


def _mesh(weight: Any) -> Any:
    return weight.device_mesh


def _dimension(mesh: Any) -> int:
    return int(mesh.mesh_dim_names.index(EP))


def _ep_place(weight: Any) -> tuple[int, int]:
    """Ranks of an "ep" group, and this one's place among them."""
    mesh = _mesh(weight)
    return mesh.size(_dimension(mesh)), mesh.get_local_rank(EP)
