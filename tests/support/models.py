"""Tiny models and batches for tests; sizes divide neither by the rank factor nor by the ranks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A seeded 3-layer fp32 Llama with weights large enough for lively gradients."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 77,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "attn_implementation": "eager",
        **overrides,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings))


def batches(
    steps: int, micro_batches: int, batch: int, length: int, vocab: int, seed: int
) -> list[list[dict[str, torch.Tensor]]]:
    """Random sequences of one length without padding, so that the mean over ranks and micro-batches is exact."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (steps, micro_batches, batch, length), generator=generator)
    return [[{"input_ids": ids, "labels": ids} for ids in step] for step in tokens]
