"""Tiny seeded models of the families people fine-tune, fp32 and eager, from Transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY = 97
# Wide enough to cut by a quarter and odd enough to divide by nothing; weights large enough for lively gradients.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 36, "n_head": 3, "n_layer": 2, "n_positions": 64, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
GEMMA = {"query_pre_attn_scalar": 12, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {**GEMMA, "tie_word_embeddings": True},
    "gemma3_text": {**GEMMA, "tie_word_embeddings": True},
    "phi": {"hidden_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"original_max_position_embeddings": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt2": {**GPT2, "tie_word_embeddings": True},
}
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 1},
    "qwen3_moe": {**MOE, "num_experts": 4, "decoder_sparse_step": 1},
}


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A seeded fp32 causal language model of a family (`model_type` of its configuration)."""
    special = (FAMILIES | EXPERT_FAMILIES)[family]
    common = {k: v for k, v in COMMON.items() if family != "gpt2" or k in ("vocab_size", "initializer_range", "pad_token_id")}
    settings = {**common, **special, **overrides}
    # Grouped matrix products of experts want sizes that these models do not have.
    config = AutoConfig.for_model(family, **settings, experts_implementation="eager")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, which engines shard one by one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def tiny_llava() -> PreTrainedModel:
    """A vision tower, a projector and a Llama."""
    text = {k: v for k, v in COMMON.items() if k != "tie_word_embeddings"}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 24,
    }
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **text},
        vision_config=vision,
        image_token_index=VOCABULARY - 1,
        image_token_id=VOCABULARY - 1,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
