"""What a checkpoint says of the model it belongs to, and whether a live run fits it."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import Any

import torch

from losia_dist.checkpoint import content
from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.safetensors_io import dtype_name
from losia_dist.checkpoint.stored_names import conversions_of, describe_conversion
from losia_dist.checkpoint.tensor_names import Contents, unwrap
from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.config.removed import removed_setting
from losia_dist.errors import CheckpointError
from losia_dist.run.conductor import LoSiA
from losia_dist.subnet.groups import GROUP_KEY

_FREE_TO_DIFFER = (
    "seed",
    "start",
)  # they decide about a run's first subnets only; the seed about all where all are drawn, or rounding is


def describe_model(model: Any, contents: Contents) -> dict[str, Any]:
    """For the base: what an exported directory needs besides the weights."""
    plain: Any = unwrap(model)
    name = type(plain).__name__.removeprefix("FSDP")
    conversions = [describe_conversion(rule) for rule in conversions_of(plain)]
    return {
        "model_class": name,
        "config": _config_of(plain, name, contents),
        "generation_config": _plain(getattr(plain, "generation_config", None)),
        "renamed_on_disk": bool(conversions),  # Transformers writes the weights under other names, or fused
        "conversions": conversions,
    }


def describe_parts(losia: LoSiA, contents: Contents) -> dict[str, Any]:
    """For a step's manifest: what must be the same in a run that loads it."""
    access = losia.parameters
    return {
        "trained": {name: _describe(access.shape(p), p.dtype) for name, p in contents.trained.items()},
        "subnets": {
            name: {
                "weight": contents.weight_of[name],
                "of": list(site.shape),
                "transposed": site.weight_is_transposed,
                # Which experts of its weight the subnets are in; nothing for a linear layer.
                **({} if site.experts is None else {"experts": list(site.experts), "stacked": site.layout.stacked}),
            }
            for name, site in contents.sites.items()
        },
        "buffers": {name: _describe(buffer.shape, buffer.dtype) for name, buffer in contents.buffers.items()},
    }


def check_fits(losia: LoSiA, contents: Contents, reader: Reader, world_size: int) -> None:
    """Refuse, before anything is changed, a checkpoint that is not this model's or this configuration's.

    Raises:
        CheckpointError: the first difference, with both values and the fix.
    """
    saved, path = reader.manifest, reader.path
    _check_config(losia.config, saved["losia_config"], path)
    here = {name: _describe(losia.parameters.shape(p), p.dtype) for name, p in contents.weights.items()}
    there = {name: {"shape": entry["shape"], "dtype": entry["dtype"]} for name, entry in reader.base["weights"].items()}
    _compare("weight", there, here, path)
    parts = describe_parts(losia, contents)
    shapes = [{name: {"shape": entry["shape"]} for name, entry in d["trained"].items()} for d in (saved, parts)]
    _compare("trained parameter", shapes[0], shapes[1], path)
    _compare("subnet", saved["subnets"], parts["subnets"], path)
    _compare("buffer", saved["buffers"], parts["buffers"], path)
    optimizer = type(losia.state.optimizer).__name__
    if saved["optimizer"] != optimizer:
        raise CheckpointError(
            f"{path} was saved with {saved['optimizer']}, and this run has {optimizer}: use the same optimizer."
        )
    groups = [key for key, _ in saved["values"]["groups"]]
    if Counter(groups) != Counter(group[GROUP_KEY] for group in losia.state.optimizer.param_groups):
        raise CheckpointError(f"{path} has other optimizer parameter groups: build them with losia_parameter_groups.")
    if losia.state.one_scalar_per_group:
        uneven = next(content.uneven_scalars(losia, contents, reader), None)
        if uneven is not None:
            raise CheckpointError(
                f"{uneven} has taken another number of optimizer steps than the rest of its group, which this engine (ZeRO) "
                f"cannot hold. Resume {path} under DDP or FSDP2."
            )
    _check_place(losia, reader, world_size)


def check_scheduler(scheduler: Any, reader: Reader) -> None:
    """Refuse to resume a schedule without its scheduler, or the other way round.

    Raises:
        CheckpointError: with what the checkpoint holds and what was passed.
    """
    kept = reader.manifest["values"]["scheduler"]
    name = None if scheduler is None else content.scheduler_name(scheduler)
    if (None if kept is None else kept["class"]) != name:
        there_is = "no scheduler" if kept is None else f"a {kept['class']}"
        raise CheckpointError(
            f"{reader.path} holds {there_is}, and {name or 'none'} was passed: pass scheduler=... as when saving."
        )


def _check_config(config: LoSiAConfig, saved: dict[str, Any], path: Any) -> None:
    removed = removed_setting(saved)
    if removed:
        raise CheckpointError(
            f"{path} was saved with a setting that is gone: {removed[0]} Resume with the version that saved it, or start a new "
            "run from an exported model."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an earlier version's form is not the user's to change here
        here, there = _flat(config), _flat(LoSiAConfig.from_dict(_with_own_columns(saved), str(path)))
    free = () if config.located is None or config.retired == "stochastic" else _FREE_TO_DIFFER
    for name in [*here, *there]:
        if here.get(name) != there.get(name) and name not in free:
            raise CheckpointError(
                f"{path} was saved with {name}={there.get(name)!r}, and this run has {name}={here.get(name)!r}: use the saved "
                "configuration, or start a new run from an exported model."
            )


def _with_own_columns(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration; drawn subnets of one that knows of no shared columns had their own."""
    selection = saved.get("selection")
    if not isinstance(selection, dict) or not isinstance(selection.get("drawn"), dict):
        return saved
    return {**saved, "selection": {"drawn": {"share_columns": False, **selection["drawn"]}}}


def _flat(config: LoSiAConfig) -> dict[str, Any]:
    values = config.to_dict()
    ((kind, options),) = values.pop("selection").items()
    return {"selection": kind, **values, **options}


def _check_place(losia: LoSiA, reader: Reader, world_size: int) -> None:
    step = reader.manifest["values"]["progress"]["clock"]["step"]
    ranks = reader.manifest["world_size"]
    inside = step % losia.config.period != 0
    if losia.config.by_rank and inside and ranks != world_size:
        raise CheckpointError(
            f"{reader.path} lies inside a time slot in which each of {ranks} ranks localizes a layer of its own "
            f"(reduction='by_rank'), and this run has {world_size} ranks. Resume on {ranks} ranks, or "
            f"from a checkpoint whose step is a multiple of the period ({losia.config.period})."
        )


def _compare(what: str, there: dict[str, Any], here: dict[str, Any], path: Any) -> None:
    for name in [*there, *here]:
        if there.get(name) != here.get(name):
            ours, theirs = ("has none of that name" if d.get(name) is None else f"has {d[name]}" for d in (here, there))
            raise CheckpointError(
                f"{path} is a checkpoint of another model, rank factor or precision: {what} {name!r}: the checkpoint {theirs}, "
                f"the model {ours}. Load it with the model and configuration it was saved with."
            )


def _describe(shape: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": dtype_name(dtype)}


def _plain(config: Any) -> dict[str, Any] | None:
    """A configuration of Transformers as its file has it; None of anything else."""
    to_json: Any = getattr(config, "to_json_string", None)
    return None if to_json is None else json.loads(to_json(use_diff=True))


def _config_of(model: Any, class_name: str, contents: Contents) -> dict[str, Any] | None:
    found = _plain(getattr(model, "config", None))
    if found is None:
        return None
    found["architectures"] = [class_name]
    found.pop("quantization_config", None)  # a model read from a quantized file trains, and is exported, dequantized
    first = next((p for p in contents.weights.values() if p.is_floating_point()), None)
    if first is not None:
        found["dtype"] = dtype_name(first.dtype)
    return found
