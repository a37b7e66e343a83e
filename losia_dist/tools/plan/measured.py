"""Activations of one decoder layer of any kind, measured on fake tensors: one forward and one backward of the fullest layer."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.tools.plan.meta_model import meta_model
from losia_dist.tools.plan.mixtures import decoder_of
from losia_dist.tools.plan.workload import Workload


class Measured(NamedTuple):
    """Bytes. shared: of what all layers share (masks, positions). saved: what backward of the layer reads, but its input.

    beyond: what backward takes beyond that at its fullest, with gradients of what trains. at_gradients: the same where each
    full gradient of a localizing weight has been formed, without those.
    """

    shared: int
    saved: int
    beyond: int
    at_gradients: list[int]


def measure(workload: Workload, localizing: bool) -> Measured:
    """One forward and backward of the fullest decoder layer, in which as many groups localize as do in a layer at most."""
    kinds = workload.shape.kinds()
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
            shape: Any = workload.shape
            raise shape.unplannable(f"a decoder layer does not run on fake tensors ({str(error).splitlines()[0]})") from error


def _one_layer(decoder: Any, layer: Any, workload: Workload, localizing: bool, live: _Live) -> Measured:
    shape = (workload.micro_batch, workload.sequence, workload.shape.hidden)
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
    at_gradients: list[int] = []
    sites = find_sites(layer) if workload.method == "losia" and localizing else []
    names = group_names(sites)[::-1][: workload.localizing_groups]
    for site in sites:
        if site.group_name in names:
            site.gradient_sink = lambda gradient, weight: at_gradients.append(live.now - gradient.nbytes)
    before = live.now
    y = layer(x.requires_grad_(), *given["inputs"], **given["options"])
    y = y[0] if isinstance(y, tuple) else y
    forward = live.now - before
    live.most = 0
    y.backward(torch.empty_like(y))
    beyond = [at - before - forward for at in (live.most, *at_gradients)]
    return Measured(given["shared"], forward - y.nbytes, beyond[0], beyond[1:])


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still there, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}

    def forget(self) -> None:
        """Count nothing of what is there."""
        self.now = self.most = 0
        self.known = {key: (reference, 0) for key, (reference, _) in self.known.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensors, counts in (((args, kwargs), False), (found, True)):
            for tensor in tree_leaves(tensors):
                if isinstance(tensor, Tensor):
                    self._note(tensor.untyped_storage(), counts)
        self.most = max(self.most, self.now)
        return found

    def _note(self, storage: Any, counts: bool) -> None:
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes() if counts else 0
            self.known[key] = (weakref.ref(storage, lambda _: self._let_go(key)), size)
            self.now += size

    def _let_go(self, key: int) -> None:
        self.now -= self.known.pop(key)[1]
