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
GROUPED = {"routed_scaling_factor": 1.0, "norm_topk_prob": True, "num_experts_per_tok": 2, "moe_intermediate_size": 22}
LATENT = {
    "kv_lora_rank": 15,
    "q_lora_rank": 18,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 3,
}
MAMBA = {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 9, "n_groups": 2, "chunk_size": 8}
BLOCKS = ["linear_attention", "moe", "full_attention", "mlp"]

# Mixtures whose experts train, by name: odd numbers of experts, of which one is never chosen; matrices that align to nothing.
# As they are stored, E experts, h hidden and i intermediate neurons:
# - qwen3_moe, mixtral, deepseek_v3: gate_up_proj [E, 2 i, h], down_proj [E, h, i]; deepseek_v3 has a dense first layer, shared
#   experts, and chooses groups of experts first;
# - gpt_oss: the other way round, [E, h, 2 i] with gate and up neurons in turns, [E, i, h]; biases, of the router too;
# - llama4_text: the other way round, [E, h, 2 i], [E, i, h]; each expert computes all tokens, those of others scaled by 0;
# - nemotron_h: up_proj [E, i, h], down_proj [E, h, i], no gate; one block a layer: Mamba, experts, attention or dense.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixture:qwen3_moe": {**MOE, "num_experts": 5, "decoder_sparse_step": 1, "moe_intermediate_size": 21},
    "mixture:mixtral": {"num_local_experts": 7, "num_experts_per_tok": 2, "intermediate_size": 23},
    "mixture:gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 19},
    "mixture:deepseek_v3": {
        **GROUPED,
        **LATENT,
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    },
    "mixture:nemotron_h": {**GROUPED, **MAMBA, "n_routed_experts": 7, "layers_block_type": BLOCKS, "num_hidden_layers": 4},
    "mixture:llama4_text": {
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "intermediate_size": 21,
        "intermediate_size_mlp": 30,
    },
}
MIXTURES["mixture:nemotron_h"]["moe_shared_expert_intermediate_size"] = 26
IDLE = {"qwen3_moe": 4, "mixtral": 2, "gpt_oss": 1, "deepseek_v3": 5, "nemotron_h": 6, "llama4_text": 3}


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A seeded fp32 causal language model of a family (`model_type` of its configuration; after "mixture:", see MIXTURES)."""
    special = (FAMILIES | EXPERT_FAMILIES | MIXTURES)[family]
    is_mixture, family = family in MIXTURES, family.removeprefix("mixture:")
    common = {k: v for k, v in COMMON.items() if family != "gpt2" or k in ("vocab_size", "initializer_range", "pad_token_id")}
    settings = {**common, **special, **overrides}
    # Grouped matrix products of experts want sizes that these models do not have.
    config = AutoConfig.for_model(family, **settings, experts_implementation="eager")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if is_mixture:
        _leave_idle(model, IDLE[family])
    return model


@torch.no_grad()
def _leave_idle(model: Any, expert: int) -> None:
    """Let no router ever choose this expert, whatever the tokens."""
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias[expert] = -100.0
        elif "Router" in type(module).__name__ and getattr(module, "bias", None) is not None:
            module.bias[expert] = -100.0
        elif "Router" in type(module).__name__:
            # No bias: a neuron that is positive for all tokens stands for it, and nothing else writes to that neuron.
            module.weight[expert] = 0.0
            module.weight[:, 0] = 0.0
            module.weight[expert, 0] = -10.0
            model.get_input_embeddings().weight[:, 0] = 0.5
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter[0] = 0.0
                elif name.endswith("experts.down_proj"):
                    parameter[(..., 0) if model.config.model_type == "llama4_text" else (slice(None), 0)] = 0.0


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
