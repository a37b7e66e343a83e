"""Handing weights over to a rollout engine (vLLM behind TRL's client): whole ones under their own names, or what changed.

A converted model's parameters are not what an engine knows: subnets and their places among them, and frozen weights without the
subnets' present values. `HandOver` gives what a plain model has; `receive` puts a hand-over of changes into plain weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.checkpoint.journal import Moved
from losia_dist.checkpoint.tensor_names import plain_entries, plain_name, unwrap
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.run.conductor import LoSiA
from losia_dist.subnet.access import read_subnet
from losia_dist.subnet.site import Site

Named = tuple[str, Tensor]
KINDS = ("whole", "changes")
_BLOCK = "@losia"  # WEIGHT@losia-3.first [r] and .second [c] int32, then .values: the third block of a hand-over


class HandOver:
    """Gives the weights of a run to whoever generates with them. Made and used by all ranks alike; reading communicates.

    Args:
        losia: of the run, from the beginning of training on.

    Attributes:
        bytes: of the latest hand-over. total_bytes: of all. whole_bytes: what a whole one takes.
    """

    def __init__(self, losia: LoSiA) -> None:
        self.losia, self._moved = losia, Moved()
        self._is_first = True
        self.bytes = self.total_bytes = 0
        plain = unwrap(losia.model)
        own = {id(tensor) for site in losia.sites for tensor in (site.subnet, site.row_index, site.col_index)}
        kept = {id(tensor) for _, tensor in plain_entries(plain)}
        # By the first of its names, as `named_parameters` and so the engines have it.
        self._named = {plain_name(n): p for n, p in plain.named_parameters() if id(p) in kept and id(p) not in own}
        self._name_of = {id(parameter): name for name, parameter in self._named.items()}
        self.whole_bytes = sum(self._size(parameter) for parameter in self._named.values())
        losia.on_retire.append(self._retired)

    def metadata(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype ("bfloat16") and shape of each tensor of `whole`. Nothing is read."""
        shape = self.losia.parameters.shape
        return [(name, _dtype(parameter), [*shape(parameter)]) for name, parameter in self._named.items()]

    def whole(self) -> Iterator[Named]:
        """Every parameter of the plain model with the values that it computes with, one in memory at a time."""
        self.losia.consolidate()
        self._moved, self.bytes = Moved(), 0
        for name, parameter in self._named.items():
            yield self._sent(name, self.losia.parameters.read_whole(parameter).detach())
        self._is_first = False

    @torch.no_grad()
    def changes(self) -> Iterator[Named]:
        """What changed since the last hand-over: where subnets lie and where they lay, and what trains in full. The first
        one is whole, as nobody knows what the engine began with.

        A block is three tensors: WEIGHT@losia-N.first and .second, where its values lie along the two dimensions of the
        stored weight, and .values. Those of later numbers are newer.

        Raises:
            UnsupportedError: experts, whose weights engines keep in another form.
        """
        if any(site.layout.experts is not None for site in self.losia.sites):
            raise UnsupportedError("hand_over='changes' is for linear layers; this model has experts: use hand_over='whole'.")
        if self._is_first:
            yield from self.whole()
            return
        access, moved, self._moved = self.losia.parameters, self._moved, Moved()
        access.reshard()
        self.bytes = number = 0
        for site, rows, columns in moved:
            if rows is None or columns is None:
                yield self._sent(self._name_of[id(site.weight)], access.read_whole(site.weight).detach())
                continue
            rows, columns = (index.to(site.row_index.device).long() for index in (rows, columns))
            yield from self._block(number, site, rows, columns, read_subnet(access, site, rows, columns))
            number += 1
        for site in self.losia.sites:
            values = access.read_whole(site.subnet).to(site.weight.dtype)
            yield from self._block(number, site, site.row_index, site.col_index, values)
            number += 1
        for name, parameter in self._named.items():
            if parameter.requires_grad:
                yield self._sent(name, access.read_whole(parameter).detach())

    def _block(self, number: int, site: Site, rows: Tensor, columns: Tensor, values: Tensor) -> Iterator[Named]:
        name = f"{self._name_of[id(site.weight)]}{_BLOCK}-{number}"
        first, second = (columns, rows) if site.layout.transposed else (rows, columns)
        yield self._sent(f"{name}.first", first.to(torch.int32))
        yield self._sent(f"{name}.second", second.to(torch.int32))
        yield self._sent(f"{name}.values", (values.T if site.layout.transposed else values).contiguous())

    def _retired(self, site: Site, _: Tensor) -> None:
        self._moved.add(site)

    def _sent(self, name: str, tensor: Tensor) -> Named:
        self.bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        return name, tensor

    def _size(self, parameter: Tensor) -> int:
        size = parameter.element_size()
        for length in self.losia.parameters.shape(parameter):
            size *= length
        return size


@torch.no_grad()
def receive(weights: Mapping[str, Tensor], named: Iterable[Named]) -> None:
    """The other end: write a hand-over, whole or of changes, into plain weights, by name. For the server of a rollout engine.

    Raises:
        KeyError: a weight that is not there.
    """
    pending: dict[str, Tensor] = {}
    for full_name, tensor in named:
        name, _, block = full_name.partition(_BLOCK)
        if not block:
            weights[name].copy_(tensor)
            continue
        part = block.partition(".")[2]
        if part != "values":
            pending[part] = tensor.long()
            continue
        weight = weights[name]
        places = pending["first"].to(weight.device).unsqueeze(-1), pending["second"].to(weight.device).unsqueeze(-2)
        weight[places] = tensor.to(weight)


def check_kind(kind: str) -> None:
    """Raises: ConfigError."""
    if kind not in KINDS:
        raise ConfigError(f"hand_over={kind!r}: give 'whole', which every engine takes, or 'changes'.")


def take_over(trainer: Any, kind: str) -> None:
    """Let TRL's own sending of weights, for a trainer that generates with vLLM, send what a `HandOver` gives. Called on all
    ranks, after the trainer was made.

    Raises:
        UnsupportedError: use_vllm in a trainer that sends weights in a way of its own, or changes inside this process.
    """
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        if getattr(trainer.args, "use_vllm", False):
            raise UnsupportedError(
                f"use_vllm=True in {type(trainer).__name__}, which sends weights in a way of its own, without subnets' values: "
                "set use_vllm=False, or use GRPOTrainer or RLOOTrainer."
            )
        return
    if kind == "changes" and generation.mode != "server":
        raise UnsupportedError("hand_over='changes' needs vllm_mode='server', with a server that has `rollout.receive`.")
    send = generation.sync_weights

    def sync_weights() -> None:
        if trainer.losia is None:
            raise UnsupportedError(
                "evaluate() or predict() before train() with use_vllm=True: evaluate during or after training."
            )
        if trainer.hand_over is None or trainer.hand_over.losia is not trainer.losia:
            trainer.hand_over = HandOver(trainer.losia)
        given: HandOver = trainer.hand_over
        if kind == "changes":
            changed = [*given.changes()]  # little, but for the first
            generation._iter_named_params = lambda: iter(changed)
            generation._weight_metadata = [(name, _dtype(tensor), [*tensor.shape]) for name, tensor in changed]
        else:
            generation._iter_named_params, generation._weight_metadata = given.whole, given.metadata()
        send()

    generation.sync_weights = sync_weights


def _dtype(tensor: Tensor | nn.Parameter) -> str:
    return str(tensor.dtype).removeprefix("torch.")
