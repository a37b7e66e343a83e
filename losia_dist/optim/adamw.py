"""AdamW with fp32 state for subnet slices, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losia_dist.errors import ConfigError

_FUSED = ("cpu", "cuda")  # devices that torch.optim.AdamW(fused=True) runs on in every supported release


class LoSiAAdamW(Optimizer):
    """AdamW (decoupled weight decay) with fp32 moments, and fp32 master values where a parameter is not fp32 itself.

    The mathematics is per element, so the same code serves whole subnets, DTensor shards and the flat fp32 partitions that
    ZeRO hands over one parameter group at a time. State per parameter: "exp_avg", "exp_avg_sq" (fp32, the parameter's
    shape), "step" (fp32 scalar on the CPU) and, for a bf16 parameter, "master" (fp32).

    Args:
        params: parameters or groups; `losia_parameter_groups(model, lr)` gives one group per decoder layer.
        lr: learning rate of groups that bring none.
        betas, eps: the paper's (0.9, 0.999) and 1e-6.
        weight_decay: of the subnet's values; the paper uses none.
    """

    keeps_adam_state = True  # moments of the parameter's shape, a step count and a master copy, and nothing else

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ConfigError(f"lr={lr!r}: a learning rate of at least 0 is needed.")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ConfigError(f"betas={betas!r}: two numbers in [0, 1) are needed, for example (0.9, 0.999).")
        if not eps > 0:
            raise ConfigError(f"eps={eps!r}: a number above 0 is needed; the paper's is 1e-6.")
        if not weight_decay >= 0:
            raise ConfigError(f"weight_decay={weight_decay!r}: a number of at least 0 is needed.")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def create_state(self) -> None:
        """Make the state of every parameter now. Engines that look for it before the first step then find it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; groups without any are passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained:
                self._step_group(group, trained)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().to(torch.float32)
        return state

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(p) for p in parameters]
        for state in states:
            state["step"] += 1
        values = [local_part(p) for p in parameters]
        masters = [local_part(state["master"]) if "master" in state else v for state, v in zip(states, values, strict=True)]
        adamw_(
            masters,
            [local_part(p.grad).to(torch.float32) for p in parameters if p.grad is not None],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            steps=[state["step"].item() for state in states],  # on the CPU: no device is waited for
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        for value, master in zip(values, masters, strict=True):
            if master is not value:
                value.copy_(master)


def local_part(tensor: Tensor) -> Tensor:
    """The block of a DTensor that this rank keeps (a subnet's rows [<= r, c]), sharing its memory; any other tensor as it is.

    The update is per element and needs no other block.
    """
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def adamw_(
    values: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    *,
    steps: list[float],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update in place; `steps` counts from 1 (Adam, algorithm 1).

    values, gradients, means, squares: equally many tensors, fp32, those in one place of any one shape ([r, c], rows of it, or
    flat); steps: one number for each place.

    One pass over memory, by torch's fused kernel, where the device has one; elsewhere step by step over the whole list.
    """
    first, second = betas
    if values[0].device.type in _FUSED:
        on_device = {step: torch.full((), step, device=values[0].device) for step in set(steps)}  # filled without a copy
        torch._fused_adamw_(
            values,
            gradients,
            means,
            squares,
            [],
            [on_device[step] for step in steps],
            lr=lr,
            beta1=first,
            beta2=second,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    if weight_decay:
        torch._foreach_mul_(values, 1 - lr * weight_decay)
    torch._foreach_lerp_(means, gradients, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, [(1 - second**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(values, means, denominators, [-lr / (1 - first**step) for step in steps])
