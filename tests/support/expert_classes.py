"""Every class of the installed Transformers that holds experts, and for each the smallest model with it.

Found by reading the modeling files: classes decorated with `use_experts_implementation`, and others that hold several experts'
weights. Models are made from each family's own configuration class, with small numbers for whatever it has fields for.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

ROOT = Path(transformers.__file__).parent / "models"
TOKENS = 12


@dataclasses.dataclass(frozen=True)
class ExpertClass:
    """A class that holds experts, by the folder of its family."""

    family: str
    name: str

    @property
    def module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def __str__(self) -> str:
        return self.name


def decorated_classes() -> list[ExpertClass]:
    """Those that compute by whichever implementation the user chose."""
    return [ExpertClass(family, node.name) for family, node in _classes() if _is_decorated(node)]


def other_classes() -> list[ExpertClass]:
    """Those with weights of several experts that are not decorated: parameters of their own, or modules in a list."""
    return [ExpertClass(family, node.name) for family, node in _classes() if not _is_decorated(node) and _holds_experts(node)]


@functools.cache
def _classes() -> tuple[tuple[str, ast.ClassDef], ...]:
    """(family, class) of all families whose files speak of experts. Read once: parsing is slow, and every test run collects."""
    found: list[tuple[str, ast.ClassDef]] = []
    for file in sorted(ROOT.glob("*/modeling_*.py")):
        if file.stem != f"modeling_{file.parent.name}":
            continue  # of TensorFlow and Flax
        text = file.read_text("utf-8")
        if "Expert" in text or "use_experts_implementation" in text:
            found += [(file.parent.name, node) for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return tuple(found)


def _is_decorated(node: ast.ClassDef) -> bool:
    names = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return any(isinstance(one, ast.Name) and one.id == "use_experts_implementation" for one in names)


def _holds_experts(node: ast.ClassDef) -> bool:
    if "Expert" not in node.name or "Router" in node.name or "Output" in node.name:
        return False
    bases = {one.attr for one in node.bases if isinstance(one, ast.Attribute)}
    calls = {one.func.attr for one in ast.walk(node) if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)}
    return bool(bases & {"ModuleDict", "ModuleList"}) or "Parameter" in calls


# What makes any model small, by the fields that families have for it.
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "out_hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "d_model": 32,
    "d_ff": 24,
    "ffn_hidden_size": 24,
    "expert_ffn_hidden_size": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "mlp_only_layers": [0],
    "num_dense_layers": 1,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "moe_top_k": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "n_heads": 4,
    "n_layers": 2,
    "num_layers": 2,
    "max_seq_len": 64,
    "share_expert_dim": 16,
    "router_hidden_size": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "rel_extent": 16,
    "unpadded_vocab_size": 97,
    "projection_hidden_dim": 32,
    "text_hidden_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _sections(*sizes: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes)}


# Classes of which no model can be trained by itself, and why.
EXCEPTIONS = {
    "Qwen3OmniMoeTalkerTextExperts": "the talker takes no token ids, but the hidden states of another model, and makes sound",
}
# What a family's own rules want beside; of a part alone, by the part's name.
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"canvas_length": TOKENS},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "text_config": {"rope_parameters": _sections(1, 1, 2)}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_sections(1, 1, 0), "partial_rotary_factor": 0.5}}},
    "glm5_next": {"qk_rope_head_dim": 0, "head_dim": 0},
    "hy_v4_vl": {"text_config": {"rope_parameters": _sections(2, 1, 1)}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "muse_spark": {"depths": [1, 1], "hidden_sizes": [16, 32], "patch_sizes": [4, 4], "projector_hidden_size": 32},
    "nllb_moe": {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},  # a layer that is dropped has no gradient
    "openai_privacy_filter": {"num_labels": 97},
    "qwen3_omni_moe": {"text_config": {"shared_expert_intermediate_size": 16}},
    "step3p7": {"sliding_window": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def model_classes(which: ExpertClass) -> list[type[PreTrainedModel]]:
    """What the family has with a head: causal language models, then those of several parts; the most alike in name first."""
    own = [one for _, one in inspect.getmembers(which.module, inspect.isclass) if one.__module__ == which.module.__name__]
    heads = [one for one in own if issubclass(one, PreTrainedModel) and "For" in one.__name__]
    kinds = ("ForCausalLM", "ForConditionalGeneration", "")

    def order(head: type) -> tuple[int, int]:
        kind = next(place for place, ending in enumerate(kinds) if head.__name__.endswith(ending))
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(head.__name__, which.name, strict=False))
        return kind, -len(list(same))

    return sorted(heads, key=order)


def tiny_config(config_class: Any, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of which every field that SMALL knows is small, its parts' too."""
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map) | {"num_labels"}
    values = {name: value for name, value in {**SMALL, **overrides}.items() if name in known}
    for name, part in (config_class.sub_configs_defaults or {}).items():
        of_part = getattr(part, "config_class", part)
        if of_part is AutoConfig:
            of_part = CONFIG_MAPPING[part.model_type]
        own = overrides.get(name, {})
        values[name] = tiny_config(of_part, {**overrides, **own})
        for setting, value in own.items():
            setattr(values[name], setting, value)  # also what the class declares no field for
    return config_class(**values, experts_implementation="eager")


def build(which: ExpertClass) -> PreTrainedModel:
    """The smallest seeded fp32 model that has a module of this class."""
    for kind in model_classes(which):
        config = tiny_config(kind.config_class, OVERRIDES.get(which.family, {}))
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = kind(config)
        if any(type(module).__name__ == which.name for module in model.modules()):
            return model
    raise LookupError(f"no model of {which.family} has {which.name} in it")


def logits_of(model: Any) -> torch.Tensor:
    """[2, ..., V], of tokens that mean nothing special to any model."""
    ids = torch.randint(10, 90, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    torch.manual_seed(0)  # diffusion draws noise
    return model(**inputs).logits


def loss_of(model: Any) -> torch.Tensor:
    """Cross entropy with targets that stand still, whatever the logits are of."""
    logits = logits_of(model).float()
    targets = torch.arange(logits[..., 0].numel()) * 7 % logits.shape[-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
