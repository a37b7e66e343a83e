"""LoSiA as others build it, written from docs/algorithm.md: the baselines that show what this package's form is worth.

Both train the same subnets with the same arithmetic as the package does between two re-localizations (`tests/contracts/
test_benchmarks.py` holds them against it), with the update of each weight run from a hook of its own in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods import RANK_FACTOR, Method, target_linears
from benchmarks.shapes import Shape
from losia_dist.formulas import subnet_size
from losia_dist.optim.adamw import adamw_
from losia_dist.subnet.drawn import Draw


def plain(shape: Shape, lr: float = 1e-5) -> Method:
    """Plain LoSiA: autograd forms every weight's full gradient, a hook slices it, steps the subnet and lets it go."""
    return _hooked("plain LoSiA (full gradients, sliced)", shape, lr, as_pro=False)


def pro(shape: Shape, lr: float = 1e-5) -> Method:
    """The authors' Pro layer: x[..., C] kept, the subnet's gradient alone computed, then scattered into dense zeros."""
    return _hooked("authors' Pro layer (dense zero gradient)", shape, lr, as_pro=True)


class _ProFunction(torch.autograd.Function):
    """y = x W^T; the weight's gradient is zero outside the subnet, and as large as the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(x[..., columns], weight, rows, columns)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, rows, columns = ctx.saved_tensors
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        chosen = grad_y[..., rows].reshape(-1, rows.numel())
        gradient = torch.zeros_like(weight)
        gradient[rows[:, None], columns] = chosen.t() @ kept.reshape(-1, columns.numel())
        return grad_x, gradient, None, None


class _ProLinear(nn.Linear):
    rows: Tensor
    columns: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return _ProFunction.apply(input, self.weight, self.rows, self.columns)


def _hooked(name: str, shape: Shape, lr: float, *, as_pro: bool) -> Method:
    model = shape.model().requires_grad_(False)
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) and ".layers." in f".{path}"):
            continue
        size = (subnet_size(module.out_features, RANK_FACTOR), subnet_size(module.in_features, RANK_FACTOR))
        found = Draw(seed=0).subnet(path, (module.out_features, module.in_features), size)
        rows, columns = (index.to(module.weight.device) for index in found)
        module.weight.requires_grad_(True).register_post_accumulate_grad_hook(_subnet_step(module.weight, rows, columns, lr))
        if as_pro:
            module.__class__ = _ProLinear
            module.rows, module.columns = rows, columns
    assert target_linears(model)

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return Method(name, model, step)


def _subnet_step(weight: Tensor, rows: Tensor, columns: Tensor, lr: float) -> Callable[[Tensor], None]:
    """AdamW over the subnet alone, run as soon as this weight's gradient is there: fp32 master and moments."""
    at = (rows[:, None], columns)
    master = weight.detach()[at].to(torch.float32)
    mean, square = torch.zeros_like(master), torch.zeros_like(master)
    steps = 0

    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        nonlocal steps
        steps += 1
        assert parameter.grad is not None
        gradient = parameter.grad[at].to(torch.float32)
        adamw_(
            [master],
            [gradient],
            [mean],
            [square],
            steps=[steps],
            lr=lr,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=0.0,
        )
        parameter.data[at] = master.to(parameter.dtype)
        parameter.grad = None

    return step
