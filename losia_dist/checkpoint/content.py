"""What a run's state is made of, engine by engine the same: out of a live run, and back into one.

Names of tensors in a step's files: `state/<parameter>/<entry>`, `rows/<layer>`, `columns/<layer>`,
`importance/<layer>/<first row>/mean` and `/deviation`, those of `checkpoint/quantized.py`, `buffer/<name>`, `value/<number>`,
`random/<number>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint import values
from losia_dist.checkpoint.quantized import read_quantized, write_quantized
from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.tensor_names import Contents
from losia_dist.run.conductor import LoSiA
from losia_dist.subnet.groups import GROUP_KEY

_NOT_SETTINGS = ("params", "param_names", GROUP_KEY)


@torch.no_grad()
def read_tensors(losia: LoSiA, contents: Contents, rank: int, world_size: int, *, copies: bool = True) -> dict[str, Tensor]:
    """This rank's share of the run's tensors, in host memory. Called by all ranks; waits for the device.

    Name -> tensor in the run's dtype: a parameter's state as `StateAccess.read_state` gives it (a subnet's [r, c]), rows
    int64 [r], columns int64 [c], importance fp32 [rows, n] of this rank's rows, buffers whole. Parameters are gathered one
    at a time and dealt out to the ranks in turn; importance stays where its rows are.

    copies: also of what is in host memory already, for a save that goes on while the run trains. Without them masters, moments
        and averages exist once, where the model is on the CPU.
    """
    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        tensors[name] = tensor.detach().to("cpu", copy=copies)

    for place, (name, parameter) in enumerate(contents.trained.items()):
        state = losia.state.read_state(parameter)
        if place % world_size == rank:
            for key, tensor in state.items():
                keep(f"state/{name}/{key}", tensor)
    for place, (name, site) in enumerate(contents.sites.items()):
        if place % world_size == rank:
            keep(f"rows/{name}", site.row_index)
            keep(f"columns/{name}", site.col_index)
    for site, accumulator in losia.accumulators.items():
        if accumulator.stop > accumulator.start:
            keep(f"importance/{site.name}/{accumulator.start}/mean", accumulator.mean)
            keep(f"importance/{site.name}/{accumulator.start}/deviation", accumulator.deviation)
    read_quantized(losia.parameters, contents.quantized, keep, rank, world_size)
    if rank == 0:
        for name, buffer in contents.buffers.items():
            keep(f"buffer/{name}", buffer)
    return tensors


def read_values(losia: LoSiA, scheduler: Any, extra: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The run's plain values as JSON; tensors among them, of any shape and dtype, are added to `tensors` as CPU copies.

    Called by all ranks; waits for the device.
    """
    carried = {name: thing.state_dict() for name, thing in losia.carried.items()}
    found = {
        "progress": losia.progress(),
        "groups": [[group[GROUP_KEY], _settings(group)] for group in losia.state.optimizer.param_groups],
        "scheduler": None if scheduler is None else {"class": scheduler_name(scheduler), "state": scheduler.state_dict()},
        "carried": carried,
        "extra": extra,
    }
    return {name: values.encode(value, tensors, "value", name) for name, value in found.items()}


@torch.no_grad()
def write_weights(losia: LoSiA, contents: Contents, reader: Reader) -> None:
    """Put the saved weights and buffers into the model, one at a time, each rank what it keeps. Called by all ranks."""
    losia.parameters.reshard()
    for name, parameter in contents.weights.items():
        losia.parameters.write_whole(parameter, reader.weight(name, with_subnet=False))
    write_quantized(losia.parameters, contents.quantized, reader)
    for name, buffer in contents.buffers.items():
        buffer.copy_(reader.tensor(f"buffer/{name}"))


@torch.no_grad()
def write_state(losia: LoSiA, contents: Contents, reader: Reader) -> None:
    """Put subnets, other trained parameters and optimizer state back. Called by all ranks."""
    for name, site in contents.sites.items():
        site.row_index.copy_(reader.tensor(f"rows/{name}"))
        site.col_index.copy_(reader.tensor(f"columns/{name}"))
    for name, parameter in contents.trained.items():
        state = reader.state(name)
        losia.parameters.write_whole(parameter, state["value"].to(parameter.dtype))
        losia.state.write_state(parameter, state)


def write_values(losia: LoSiA, saved: dict[str, Any], scheduler: Any) -> None:
    """Put clock, learning rates, importance's place, scheduler and engine counters back. Called by all ranks."""
    losia.restore_progress(saved["progress"])
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for key, settings in saved["groups"]:
        groups.setdefault(key, []).append(settings)
    for group in losia.state.optimizer.param_groups:
        group.update(groups[group[GROUP_KEY]].pop(0))
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"]["state"])
    for name, thing in losia.carried.items():
        thing.load_state_dict(saved["carried"].get(name), losia.steps)


@torch.no_grad()
def write_importance(losia: LoSiA, reader: Reader) -> None:
    """Fill the averages of the slot in progress: each rank reads its rows, however they were cut when saved."""
    for site, accumulator in losia.accumulators.items():
        for kind, target in (("mean", accumulator.mean), ("deviation", accumulator.deviation)):
            for first, piece in reader.importance(site.name, kind):
                start, stop = max(first, accumulator.start), min(first + piece.get_shape()[0], accumulator.stop)
                if start < stop:
                    target[start - accumulator.start : stop - accumulator.start].copy_(piece[start - first : stop - first])


def scheduler_name(scheduler: Any) -> str:
    """Class of a scheduler; Accelerate's wrapper counts as what it wraps."""
    return type(getattr(scheduler, "scheduler", scheduler)).__name__


def uneven_scalars(losia: LoSiA, contents: Contents, reader: Reader) -> Iterator[str]:
    """Parameters whose saved scalars differ from those of their group's first one."""
    key_of = {id(site.subnet): site.group_name for site in losia.sites}
    first: dict[str | None, dict[str, Any]] = {}
    for name, parameter in contents.trained.items():
        scalars = {key: tensor.item() for key, tensor in reader.state(name).items() if tensor.dim() == 0 and key != "value"}
        if scalars != first.setdefault(key_of.get(id(parameter)), scalars):
            yield name


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
