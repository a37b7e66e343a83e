"""Backward through all layers for importance alone: no parameter gets a gradient, whatever engine holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.errors import ConfigError
from losia_dist.subnet.linear import TiedSubnetEmbedding

Batch = dict[str, Any]


class CalibrationBackward:
    """Runs micro-batches forward and backward; gradient sinks of the layers see their full gradients.

    The gradient is asked for the embeddings' outputs alone (and for a subnet that an embedding shares, whose look-up is part
    of its layer's gradient): no hook of an engine on a parameter fires, and nothing has to be cleared afterwards. Gradient
    checkpointing works, but the reentrant kind.

    Args:
        model: unwrapped from DDP; in training mode if activations are to be recomputed.
        compute_loss: (model, batch) -> mean loss of the batch.
    """

    def __init__(self, model: nn.Module, compute_loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.model, self.compute_loss = model, compute_loss
        self._targets: list[Tensor] = []

    def run(self, batch: Batch) -> None:
        """One micro-batch.

        Raises:
            ConfigError: the batch's forward looks no token up.
        """
        handles = [h for module in _embeddings(self.model) for h in self._watch(module)]
        self._targets = []
        try:
            with torch.enable_grad():
                loss = self.compute_loss(self.model, batch)
                if not self._targets:
                    raise ConfigError(
                        "locating subnets begins at the token embedding, which this forward never calls: give batches with "
                        "input_ids instead of inputs_embeds."
                    )
                torch.autograd.grad(loss, self._targets, allow_unused=True)
        finally:
            self._targets = []
            for handle in handles:
                handle.remove()

    def _watch(self, module: nn.Module) -> list[Any]:
        # Before the look-up a sharded engine has the subnet whole: the object that this forward's graph ends in.
        handles = [module.register_forward_hook(self._ask_output)]
        if isinstance(module, TiedSubnetEmbedding):
            handles.append(module.register_forward_pre_hook(self._ask_subnet))
        return handles

    def _ask_subnet(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, TiedSubnetEmbedding)
        self._targets.append(module.subnet)

    def _ask_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        self._targets.append(output)
        return output.clone()  # some models change it in place, which a leaf does not allow


def _embeddings(model: nn.Module) -> list[nn.Module]:
    get_input: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = get_input() if callable(get_input) else None
    except NotImplementedError:
        found = None
    return [found] if found is not None else [module for module in model.modules() if isinstance(module, nn.Embedding)]


@contextmanager
def same_noise(device: torch.device, place: int) -> Iterator[None]:
    """Dropout of micro-batch `place` falls alike in every pass, and the run's own random numbers are not used up."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(place)
        yield
