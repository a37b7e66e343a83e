"""The training methods that the benchmarks compare, each as one step function over the same kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups


@dataclass
class Shape:
    """A Llama's sizes, and the batch it is trained on."""

    layers: int = 8
    hidden: int = 1024
    intermediate: int = 2816
    vocabulary: int = 4096
    batch: int = 2
    length: int = 512
    dtype: torch.dtype = torch.float32

    def model(self) -> LlamaForCausalLM:
        """Random weights, every one trainable, the same for every method."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            num_key_value_heads=max(1, self.hidden // 64),
            max_position_embeddings=self.length,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config).to(self.dtype).train()

    def tokens(self, device: str = "cpu") -> Tensor:
        """One micro-batch, int64 [batch, length]."""
        return torch.randint(0, self.vocabulary, (self.batch, self.length), generator=torch.Generator().manual_seed(1)).to(
            device
        )


@dataclass
class Method:
    """A prepared run: `step(tokens)` does forward, backward, optimizer and whatever else the method needs."""

    name: str
    model: nn.Module
    step: Callable[[Tensor], None]
    optimizer: Any = None
    losia: LoSiA | None = None


def floor(shape: Shape) -> Method:
    """Frozen model, forward and the gradient of every layer's input: what no method that trains inside all layers can avoid."""
    model = shape.model().requires_grad_(False)
    model.enable_input_require_grads()

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return Method("floor (forward and dx)", model, step)


def full(shape: Shape) -> Method:
    """Every linear layer of the decoder trains in full; AdamW of torch (foreach) on fp32 or bf16 weights as they are."""
    model = shape.model().requires_grad_(False)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    return Method("full fine-tuning", model, _plain_step(model, optimizer), optimizer)


def lora(shape: Shape, rank: int) -> Method:
    """PEFT's LoRA on the same layers."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(shape.model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    return Method(f"LoRA r = {rank}", model, _plain_step(model, optimizer), optimizer)


def equal_lora_rank(shape: Shape, rank_factor: float) -> int:
    """The LoRA rank that trains about as many parameters as subnets of this rank factor do."""
    sizes = [(shape.hidden, shape.hidden)] * 4 + [(shape.intermediate, shape.hidden)] * 3
    return max(1, round(sum(m * n for m, n in sizes) * rank_factor**2 / sum(m + n for m, n in sizes)))


def losia(shape: Shape, *, localizing: bool, rank_factor: float = 0.125, period: int = 1_000_000) -> Method:
    """This package. Without `localizing` no layer collects importance, as in all layers but L-th part of a real step."""
    model, config = shape.model(), LoSiAConfig(rank_factor=rank_factor, period=period)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-5), lr=1e-5)
    conductor = LoSiA(model, optimizer, config)
    if not localizing:
        for layer in conductor.layers:
            layer.gradient_sink = None

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        conductor.step()
        optimizer.zero_grad(set_to_none=True)

    name = "LoSiA, localizing one layer" if localizing else "LoSiA, not localizing"
    return Method(name, model, step, optimizer, conductor)


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
