"""`load_distributed_model`: Transformers loads a model shard by shard, and it gets its subnets on the way.

Transformers builds the model on the meta device, cuts it (expert parallelism, FSDP2), and only then reads weights, on every
rank those of its own shards. Subnets must be there before it is cut, so that they are cut too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.model import get_losia_model
from losia_dist.sharding.expert_parallel import check_config, check_experts, check_parallelism, expert_plan, note_held_experts
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.access import read_subnet
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.drawn import Draw
from losia_dist.subnet.targets import output_layer_name

_ALL = 1 << 30  # more experts than any layer has


def load_distributed_model(
    directory: str | Path,
    config: LoSiAConfig,
    distributed_config: Any,
    *,
    auto_class: Any = None,
    subnet_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """A model with subnets under FSDP2, or FSDP2 and expert parallelism, each rank with its shards alone. Called by all ranks.

    What `get_losia_model` and `from_pretrained(directory, distributed_config=...)` do, together: no rank ever holds whole
    weights. Then build the optimizer and `LoSiA(...)`, as after `fully_shard`. Gradients are clipped by
    `losia_dist.clip_grad_norm_`: the parameters lie on two meshes. With experts_per_slot="auto" all experts of a layer localize
    together where they are spread over ranks.

    Args:
        directory: of the model.
        config: what trains.
        distributed_config: Transformers' `DistributedConfig(fsdp_size=..., ep_size=..., dp_replicate_size=...)`.
        auto_class: whose `from_pretrained` loads; None: `AutoModelForCausalLM`.
        subnet_dtype: as for `get_losia_model`.
        kwargs: for `from_pretrained` (dtype, attn_implementation, ...).

    Raises:
        ConfigError: as `get_losia_model`; a release of Transformers that has no `DistributedConfig`; fewer than two ranks.
        UnsupportedError: tensor or pipeline parallelism, offload, a quantized model, a tied output layer that is to train, an
            expert count that ep_size does not divide or that leaves a rank without any, experts that localize in parts, or a
            configuration that expert parallelism does not go with. Same on every rank, before weights are read.
    """
    try:
        from transformers import AutoModelForCausalLM, PreTrainedModel
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
    except ImportError as error:
        raise ConfigError(
            f"load_distributed_model needs the DistributedConfig of Transformers 5.24 or newer ({error}). Upgrade it, or shard "
            "the model with fully_shard."
        ) from error
    if isinstance(distributed_config, dict):
        distributed_config = DistributedConfig.from_dict(distributed_config)
    if not isinstance(distributed_config, DistributedConfig):
        raise ConfigError(
            f"distributed_config is a {type(distributed_config).__name__}: pass transformers.distributed's DistributedConfig("
            "fsdp_size=..., ep_size=...)."
        )
    check_parallelism(distributed_config)
    if distributed_config.fsdp_cpu_offload:
        raise UnsupportedError("DistributedConfig(fsdp_cpu_offload=True) is not tested with subnets: leave it out.")
    if distributed_config.dp_size == 1:
        raise ConfigError(
            f"DistributedConfig(fsdp_size={distributed_config.fsdp_size}): at least two ranks are needed. Set fsdp_size, or "
            "load the model with from_pretrained and call get_losia_model."
        )
    ep_size = distributed_config.ep_size
    if ep_size > 1:
        check_config(config)

    parts = config
    if ep_size > 1 and config.located is not None and config.experts_per_slot == "auto":
        parts = replace(config, experts_per_slot=_ALL)  # each rank forms the gradient of its own experts alone

    def give_subnets(model: Any) -> None:
        _refuse_quantized(model)
        _refuse_tied(model, config)
        get_losia_model(model, parts, subnet_dtype)
        sites = find_sites(model)
        names = {name for site in sites for name in (site.names.subnet, site.names.row_index, site.names.col_index)}
        # They are in no file; they are made once the weights are there.
        model._keys_to_ignore_on_load_missing = {
            *(model._keys_to_ignore_on_load_missing or ()),
            *(rf"\.{name}$" for name in names),
        }
        check_experts(sites, distributed_config.fsdp_size, ep_size)
        if ep_size > 1:
            if (
                getattr(model.config, "_experts_implementation", None) == "deepgemm_megamoe"
            ):  # it would take the place of the all-to-all
                raise UnsupportedError("experts_implementation='deepgemm_megamoe' computes no gradients: leave it out.")
            plan = {**model.ep_plan, **(distributed_config.ep_plan or {})}
            model.ep_plan = {**model.ep_plan, **expert_plan(sites, plan, replace_layer_number_by_wildcard)}
        trains.update({name: parameter.requires_grad for name, parameter in model.named_parameters()})

    trains: dict[str, bool] = {}
    with _before_it_is_cut(PreTrainedModel, give_subnets):
        model: Any = (auto_class or AutoModelForCausalLM).from_pretrained(
            str(directory), distributed_config=distributed_config, **kwargs
        )
    if not trains:
        raise UnsupportedError(f"{type(model).__name__} was not cut by Transformers' own loading, so that it got no subnets.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])  # loading makes new parameters
    note_held_experts(model)
    _cut_first(model, Draw.of(config))
    return model


def _refuse_quantized(model: Any) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedError(
            f"load_distributed_model of a quantized {type(model).__name__}: codes were not tried where Transformers cuts a "
            "model while loading it, nor with expert parallelism. Leave quantization_config out (and load files that are not "
            "quantized), or use from_pretrained, get_losia_model and fully_shard."
        )


def _refuse_tied(model: Any, config: LoSiAConfig) -> None:
    """Transformers ties weights once they are loaded, after FSDP2 has taken the output layer and the embedding apart."""
    output = output_layer_name(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if config.output_rank_factor is not None and f"{output}.weight" in {*tied, *tied.values()}:
        raise UnsupportedError(
            f"output_rank_factor={config.output_rank_factor}: {output} shares its weight with the input embedding, and cannot "
            "train where Transformers shards the model while loading. Set output_rank_factor=None, or shard with fully_shard."
        )


@torch.no_grad()
def _cut_first(model: Any, draw: Draw) -> None:
    """Draw the first subnets and take their values from the weights, now that these are there. Called by all ranks."""
    access = resolve_parameters(model)
    for site in find_sites(model):
        rows, columns = draw.subnets(site.matrix_names, site.shape, site.subnet_shape, linear=site.is_linear)
        site.row_index.copy_(rows.view(site.row_index.shape))
        site.col_index.copy_(columns.view(site.col_index.shape))
        access.write_whole(site.subnet, read_subnet(access, site, site.row_index, site.col_index))
        site.awaits_weights = False


@contextmanager
def _before_it_is_cut(kind: Any, prepare: Any) -> Iterator[None]:
    """While a model is loaded in here, `prepare(model)` is called once it was built and before it is cut."""
    own = kind.__dict__.get("maybe_distribute_model")
    inherited = kind.maybe_distribute_model.__func__

    def prepared(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(model)
        return inherited(cls, model, *args, **kwargs)

    kind.maybe_distribute_model = classmethod(prepared)
    try:
        yield
    finally:
        if own is None:
            del kind.maybe_distribute_model
        else:
            kind.maybe_distribute_model = own
