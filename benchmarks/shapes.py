"""The models and batches that methods are compared on: Llamas with random weights."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Shape:
    """A Llama's sizes, and the batch it is trained on. The default has 107 M parameters and a batch of 1,024 tokens."""

    layers: int = 8
    hidden: int = 1024
    intermediate: int = 2816
    vocabulary: int = 4096
    heads: int = 0  # 0: hidden / 64
    kv_heads: int = 0  # 0: as many as heads
    tied: bool = False
    batch: int = 2
    length: int = 512
    dtype: str = "fp32"
    device: str = "cpu"
    checkpointing: bool = False

    def model(self) -> LlamaForCausalLM:
        """Random weights, every one trainable, the same for every method; made on the device, in the dtype."""
        torch.manual_seed(0)
        heads = self.heads or max(1, self.hidden // 64)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads or heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=self.tied,
            attn_implementation="sdpa",
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.dtype])
        try:
            with torch.device(self.device):
                model = LlamaForCausalLM(config).train()
        finally:
            torch.set_default_dtype(before)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def tokens(self) -> Tensor:
        """One micro-batch, int64 [batch, length]."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.vocabulary, (self.batch, self.length), generator=generator).to(self.device)

    def linears(self) -> list[tuple[int, int]]:
        """(m, n) of the target linears of one decoder layer: q, k, v, o, gate, up, down."""
        heads = self.heads or max(1, self.hidden // 64)
        keys = self.hidden // heads * (self.kv_heads or heads)
        attention = [(self.hidden, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, self.hidden)]
        return [*attention, *[(self.intermediate, self.hidden)] * 2, (self.hidden, self.intermediate)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, stored beside the numbers."""
        return asdict(self)


LLAMA_7B = Shape(layers=32, hidden=4096, intermediate=11008, vocabulary=32000, heads=32)
LLAMA_1B = Shape(layers=16, hidden=2048, intermediate=8192, vocabulary=128256, heads=32, kv_heads=8, tied=True)
LLAMA_8B = Shape(layers=32, hidden=4096, intermediate=14336, vocabulary=128256, heads=32, kv_heads=8)


def add_shape_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """One option for each of a shape's fields; `defaults` differ from Shape's own."""
    for field in fields(Shape):
        if field.name == "dtype":
            continue  # benchmarks take one or several
        default, option = defaults.get(field.name, field.default), f"--{field.name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(default), default=default)


def shape_from(options: argparse.Namespace, dtype: str) -> Shape:
    """The shape that the options ask for."""
    chosen = {field.name: getattr(options, field.name) for field in fields(Shape) if field.name != "dtype"}
    return Shape(**chosen, dtype=dtype)
