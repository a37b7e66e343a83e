"""Activations of one decoder layer, measured on fake tensors: one forward and one backward of the fullest layer, in bf16."""

from __future__ import annotations

import warnings
import weakref
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.tools.plan.meta_model import meta_model
from losia_dist.tools.plan.model_shape import decoder_of
from losia_dist.tools.plan.workload import Workload


class Measured(NamedTuple):
    """Bytes. shared: of what all layers share (masks, positions). saved: what backward of the layer reads, but its input.

    beyond: what backward takes beyond that at its fullest, with gradients of what trains: until the first full gradient of a
    localizing weight is formed, from there to the second, and so on, those gradients left out.
    """

    shared: int
    saved: int
    beyond: list[int]


def layer_activations(workload: Workload, localizing: bool = False) -> Measured:
    """Of the fullest decoder layer, in which as many groups localize as do in a layer at most. Measured once for each use."""
    key = (
        workload.method,
        workload.micro_batch,
        workload.sequence // workload.sequence_ranks,
        workload.lora_rank,
        repr(workload.config),
        localizing,
    )
    measured = workload.shape.measured
    if key not in measured:
        measured[key] = _measure(workload, localizing)
    return measured[key]


def _measure(workload: Workload, localizing: bool) -> Measured:
    kinds = workload.shape.kinds
    fullest = max(range(len(kinds)), key=lambda place: kinds[place][1].parameters)
    before = sum(count for count, _ in kinds[:fullest])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = meta_model(workload, before + 1)
        decoder = decoder_of(model)
        *others, layer = decoder.layers
        for other in others:
            other.forward = lambda hidden_states, *_, **__: hidden_states
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
                model.to_empty(device="cpu")
                return _one_layer(decoder, layer, workload, localizing, live)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise workload.shape.unplannable(
                f"a decoder layer does not run on fake tensors ({str(error).splitlines()[0]})"
            ) from error


def _one_layer(decoder: Any, layer: Any, workload: Workload, localizing: bool, live: _Live) -> Measured:
    # GPUs that share sequences have all heads of their own tokens, or as much of all tokens' own heads.
    shape = (workload.micro_batch, workload.sequence // workload.sequence_ranks, workload.shape.hidden)
    x = torch.empty(shape, dtype=torch.bfloat16)
    live.forget()
    given: dict[str, Any] = {}

    def note(module: Any, inputs: Any, options: dict[str, Any]) -> None:
        if not given:
            given.update(shared=live.now, inputs=inputs[1:], options=options)

    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        decoder(inputs_embeds=x, use_cache=False)
    hook.remove()
    formed: list[int] = []
    sites = find_sites(layer) if workload.method == "losia" and localizing else []
    names = group_names(sites)[::-1][: workload.localizing_groups]
    for site in sites:
        if site.group_name in names:
            site.gradient_sink = lambda gradient, weight: formed.append(live.leave_out(gradient))
    before = live.now
    y = layer(x.requires_grad_(), *given["inputs"], **given["options"])
    y = y[0] if isinstance(y, tuple) else y
    forward = live.now - before
    started = len(live.history)
    y.backward(torch.empty_like(y))
    parts = pairwise([started, *formed, len(live.history)])
    return Measured(given["shared"], forward - y.nbytes, [max(live.history[a:b]) - before - forward for a, b in parts])


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still there: now, and after each operation so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.history: list[int] = []
        self.known: dict[int, Any] = {}

    def forget(self) -> None:
        """Count nothing of what is there."""
        self.now = 0
        self.known = {key: (reference, 0, place) for key, (reference, _, place) in self.known.items()}

    def leave_out(self, tensor: Tensor) -> int:
        """Count nothing of a tensor so far; returns the place in `history` where it was made."""
        _, size, made = self.known[tensor.untyped_storage()._cdata]
        self.history[made:] = [held - size for held in self.history[made:]]
        return int(made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensors, counts in (((args, kwargs), False), (found, True)):
            for tensor in tree_leaves(tensors):
                if isinstance(tensor, Tensor):
                    self._note(tensor.untyped_storage(), counts)
        self.history.append(self.now)
        return found

    def _note(self, storage: Any, counts: bool) -> None:
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes() if counts else 0
            self.known[key] = (weakref.ref(storage, lambda _: self._let_go(key)), size, len(self.history))
            self.now += size

    def _let_go(self, key: int) -> None:
        self.now -= self.known.pop(key)[1]
