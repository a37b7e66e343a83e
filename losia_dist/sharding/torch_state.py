"""State of an ordinary torch optimizer over the model's own parameters: one process, DDP, ZeRO stage 0 in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_dist.sharding.interface import clear_state
from losia_dist.subnet.groups import GROUP_KEY


class TorchState:
    """`StateAccess` where the optimizer's parameters are the model's, or fp32 copies of them.

    Args:
        optimizer: holds the state.
        masters: model parameter -> the fp32 copy that the optimizer updates; None: the parameters themselves.
    """

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

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        for group in self.optimizer.param_groups:
            if group[GROUP_KEY] == group_name:
                clear_state(self.optimizer, group["params"], restart_bias_correction)

    def state_tensors(self) -> list[Tensor]:
        kept = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
        return kept + list((self._masters or {}).values())
