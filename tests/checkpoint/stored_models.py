"""Tiny models that Transformers stores in another form than it has in memory, and some mixtures that it does not."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}

# Family -> (settings, what gets subnets).
STORED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "qwen3_moe": ({**EXPERTS, "num_experts": 5, "decoder_sparse_step": 1}, ATTENTION),
    "mixtral": ({"num_local_experts": 5, "num_experts_per_tok": 2, "tie_word_embeddings": True}, ATTENTION),
    "deepseek_v3": (
        {
            **EXPERTS,
            **LATENT,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
        ["q_b_proj", "kv_b_proj", "o_proj"],
    ),
    "nemotron_h": (
        {
            **EXPERTS,
            **MAMBA,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
        },
        ATTENTION,
    ),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "llama4_text": ({"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40}, ATTENTION),
    "hrm_text": ({}, ["q_proj", "v_proj"]),  # no experts: four matrices in memory are one in the files
    "gpt_neox": ({}, ["query_key_value"]),  # no experts: the output layer has another name
}


def stored_model(family: str) -> PreTrainedModel:
    """A seeded fp32 causal language model in eager implementations."""
    settings = {**COMMON, **STORED[family][0]}
    if family == "nemotron_h":
        settings.pop("num_hidden_layers")
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
