"""State of an ordinary torch optimizer over the model's own parameters: one process, DDP, ZeRO stage 0 in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_dist.sharding.entries import as_tensor, clear_state, store_state
from losia_dist.subnet.groups import GROUP_KEY


class TorchState:
    """`StateAccess` where the optimizer's parameters are the model's, or fp32 copies of them.

    Args:
        optimizer: holds the state.
        masters: model parameter -> the fp32 copy that the optimizer updates; None: the parameters themselves.
    """

    one_scalar_per_group = False

    def __init__(self, optimizer: Optimizer, masters: dict[nn.Parameter, Tensor] | None = None) -> None:
        self.optimizer = optimizer
        self._masters = masters

    @torch.no_grad()
    def write_master(self, parameter: nn.Parameter, values: Tensor) -> None:
        fragment = self.master_fragment(parameter)
        if fragment is not parameter and fragment is not None:
            fragment.data.copy_(values)

    def master_fragment(self, parameter: nn.Parameter) -> Tensor | None:
        if self._masters is not None:
            return self._masters[parameter]
        return self.optimizer.state.get(parameter, {}).get("master", parameter)

    def stepped(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        holder = self._holder(parameter)
        if all(holder is not held for group in self.optimizer.param_groups for held in group["params"]):
            return None
        return self.optimizer.state.get(holder, {}).get("master", holder).detach(), parameter.detach()

    def without_padding(self, gradient: Tensor, parameter: Tensor) -> list[Tensor]:
        return [gradient]

    def read_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        found = {"value": self.master_fragment(parameter), **self._entries(parameter)}
        tensors = {key: as_tensor(value) for key, value in found.items() if key != "master"}
        return {key: tensor.detach() for key, tensor in tensors.items() if tensor is not None}

    @torch.no_grad()
    def write_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        self.write_master(parameter, state["value"])
        self.store_entries(parameter, state, lambda entry, values: entry.copy_(values))

    def store_entries(self, parameter: nn.Parameter, state: dict[str, Tensor], store: Callable[[Tensor, Tensor], Any]) -> None:
        """`write_state` without the master: `store(entry, whole values)` cuts the values as the entry is cut.

        state: as `StateAccess.write_state` takes it, whole: a subnet's "value" and moments [r, c], scalars [].
        """
        holder = self._holder(parameter)
        store_state(self.optimizer.state[holder], state, holder, store, self.optimizer)

    def _holder(self, parameter: nn.Parameter) -> Tensor:
        """The tensor under which the optimizer keeps its entries."""
        return parameter if self._masters is None else self._masters[parameter]

    def _entries(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.optimizer.state.get(self._holder(parameter), {})

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        for group in self.optimizer.param_groups:
            if group[GROUP_KEY] == group_name:
                clear_state(self.optimizer, group["params"], restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        kept = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
        return kept + list((self._masters or {}).values())
