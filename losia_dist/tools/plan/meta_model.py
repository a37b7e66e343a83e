"""A workload's model on the meta device, with the method's layers: what is simulated, and what activations are measured on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from losia_dist.model import get_losia_model
from losia_dist.tools.plan.model_shape import decoder_of
from losia_dist.tools.plan.workload import Workload


def meta_model(workload: Workload, layers: int | None = None) -> Any:
    """In bf16 and training mode, with subnets, LoRA pairs or all weights trainable; not sharded, without checkpointing.

    layers: how many decoder layers to keep; None: all.
    """
    model = workload.shape.build()
    model.tie_weights()
    model.train()
    decoder = decoder_of(model)
    decoder.layers = decoder.layers[:layers]
    if workload.method == "full":
        model.to(torch.bfloat16)  # routers that some families keep in fp32: FSDP2 trains a unit of one dtype
    if workload.method == "losia":
        get_losia_model(model, replace(workload.config, retired=None))  # which is a quantized model's; this one is in bf16
    elif workload.method == "lora":
        _add_low_rank(model, workload.lora_rank)
    return model


class _LowRankLinear(nn.Module):
    """y = x W^T + x A^T B^T with W frozen: LoRA (Hu et al., arXiv 2106.09685), to compare with. A [r, n], B [m, r]."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        like: dict[str, Any] = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, rank, **like)
        self.up = nn.Linear(rank, base.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class _LowRankExperts(nn.Module):
    """W + B A of all experts, formed whole, as PEFT's `target_parameters` does. W [E, m, n], A [E, r, n], B [E, m, r]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        experts, m, n = weight.shape
        self.down, self.up = (nn.Parameter(weight.new_empty(size)) for size in ((experts, rank, n), (experts, m, rank)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.bmm(self.up, self.down)


def _add_low_rank(model: Any, rank: int) -> None:
    """Freeze a model and give every linear layer and every fused expert weight of its decoder a LoRA pair, in place."""
    model.requires_grad_(False)
    layers = decoder_of(model).layers
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            layers.set_submodule(name, _LowRankLinear(module, rank))
        for parameter, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() == 3:
                parametrize.register_parametrization(module, parameter, _LowRankExperts(weight, rank), unsafe=True)
