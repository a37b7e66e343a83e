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

EP, EFSDP = "ep", "efsdp"  # what Transformers calls the dimensions of the mesh


def is_spread(parameter: Tensor) -> bool:
    """Whether this is a parameter of experts that are spread over ranks."""
    return EP in _names(parameter)


def is_whole_expert(parameter: Tensor) -> bool:
    """Whether this is a parameter of such experts that every rank of an "ep" group holds for itself."""
    names = _names(parameter)
    return EFSDP in names and EP not in names


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
        UnsupportedError: tensor or pipeline parallelism, or another way to bring experts their tokens than an all-to-all.
    """
    for name, kind in (("tp_size", "tensor"), ("pp_size", "pipeline")):
        size = getattr(settings, name, None) or 1
        if size > 1:
            raise UnsupportedError(
                f"DistributedConfig({name}={size}): LoSiA does not train under {kind} parallelism. Leave {name} out; "
                "fsdp_size, dp_replicate_size and ep_size are supported."
            )
    way = getattr(settings, "ep_implementation", "auto")
    if way not in ("auto", "all_to_all"):
        raise UnsupportedError(
            f"DistributedConfig(ep_implementation={way!r}): subnets train where tokens travel to their experts. Leave it out, "
            "or set 'all_to_all'."
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


def refuse_calibration(sites: list[Site]) -> None:
    """Refuse what is measured by micro-batch, where experts are spread over ranks. No communication.

    Raises:
        UnsupportedError: they are.
    """
    spread = [site.name for site in sites if site.held is not None]
    if spread:
        raise UnsupportedError(
            f"calibration is by micro-batch, and the experts of {some(spread)} see those of several ranks at once (ep_size): "
            "leave losia.locate(...) out."
        )


def check_experts(sites: list[Site], fsdp_size: int, ep_size: int) -> None:
    """Refuse experts that cannot be spread over so many ranks, before they are. No communication.

    Raises:
        UnsupportedError: a count that ep_size does not divide or that leaves a rank without any, experts that localize in
            parts, or of a kind without a plan.
    """
    for site in sites:
        if site.experts is None:
            continue
        count = site.layout.number_of_experts(tuple(site.weight.shape))
        own, replicas = count // ep_size, fsdp_size // ep_size
        if count % ep_size == 0 and -(-own // replicas) * (replicas - 1) >= own:
            raise UnsupportedError(
                f"fsdp_size={fsdp_size}, ep_size={ep_size} cut {own} experts of {site.name} over {replicas} ranks, which "
                "leaves one without any; Transformers' loading does not take that. Choose a larger ep_size, or fewer ranks."
            )
        if ep_size == 1:
            continue
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
                f"have to be spread over all ranks. Leave experts_per_slot out, or draw subnets (selection=Drawn())."
            )


def expert_plan(sites: list[Site], plan: dict[str, str], generic: Any) -> dict[str, str]:
    """Rules of an expert-parallel plan for subnets: each that of its weight.

    plan: the model's, by names with `*` for layer numbers. generic: full name -> such a name.

    Raises:
        UnsupportedError: experts that the plan leaves whole, or some of their parameters.
    """
    found = {}
    for site in sites:
        if site.experts is None:
            continue
        module, _, _ = site.name.rpartition(".")
        of_experts = [name for name, p in site.module.named_parameters(recurse=False) if p.dim() > 1]
        own = {one.names.subnet for one in sites if one.module is site.module}
        lacking = [name for name in of_experts if name not in own and generic(f"{module}.{name}") not in plan]
        if lacking or plan.get(generic(module)) != "ep_dispatch_experts":
            raise UnsupportedError(
                f"the model's expert-parallel plan has no rule for {module}.{(lacking or of_experts)[0]}, or none that brings "
                "the experts their tokens ('ep_dispatch_experts'): ranks would compute with other experts than they are asked "
                "for. Use fsdp_size alone."
            )
        found[generic(f"{module}.{site.names.subnet}")] = plan[generic(site.name)]
    return found


def refuse_unfit(sites: list[Site], config: LoSiAConfig, process_group: dist.ProcessGroup | None) -> None:
    """Look at a model whose experts are spread over ranks, before training. No communication; the same on every rank.

    process_group: ranks that are to train; None: all.

    Raises:
        UnsupportedError: experts that were spread before the model was converted, a part of the ranks, or a configuration that
            this does not go with.
    """
    spread = [site for site in sites if is_spread(site.weight)]
    if not spread:
        return
    check_config(config)
    late = [site.name for site in spread if site.held is None or not is_spread(site.subnet)]
    if late:
        raise UnsupportedError(
            f"the experts of {some(late)} were spread over ranks before they got subnets. Load the model by "
            "losia_dist.load_distributed_model(directory, config, distributed_config)."
        )
    if process_group is not None and dist.get_world_size(process_group) != dist.get_world_size():
        raise UnsupportedError(
            f"process_group has {dist.get_world_size(process_group)} of {dist.get_world_size()} ranks, and all of them hold "
            "experts of one model (ep_size): leave process_group out."
        )


def replica_group(sites: list[Site], agreement: Agreement) -> tuple[dist.ProcessGroup | None, bool]:
    """Ranks that compute with the same experts as this one (None: it alone), and whether experts are spread over ranks at all.

    Called by all ranks; makes process groups.
    """
    spread = [site for site in sites if is_spread(site.weight)]
    if not spread:
        return None, False
    mesh = _mesh(spread[0].weight)
    mine: list[int] = sorted(mesh.mesh.select(_dimension(mesh), mesh.get_local_rank(EP)).flatten().tolist())
    group = None
    for ranks in sorted({tuple(ranks) for ranks in agreement.gather(mine)}):
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


def _names(parameter: Tensor) -> tuple[str, ...]:
    """Of the dimensions of a DTensor's mesh."""
    mesh = getattr(parameter, "device_mesh", None)  # its class is not loaded where nothing is distributed
    return getattr(mesh, "mesh_dim_names", None) or ()


def _mesh(weight: Any) -> Any:
    return weight.device_mesh


def _dimension(mesh: Any) -> int:
    return int(mesh.mesh_dim_names.index(EP))


def _ep_place(weight: Any) -> tuple[int, int]:
    """Ranks of an "ep" group, and this one's place among them."""
    mesh = _mesh(weight)
    return mesh.size(_dimension(mesh)), mesh.get_local_rank(EP)
