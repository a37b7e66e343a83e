"""Layers that get no gradient from a language-model loss: seen at the start, left out with a line, refused by name."""

import ast
import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from losia_dist import LoSiAConfig, get_losia_model
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
}
SEQ2SEQ = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 97}
RECURRENT = {"lru_width": 32, "attention_window_size": 8, "head_dim": 8, "num_hidden_layers": 3}


def build(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, experts_implementation="eager")
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def without_gradient(model: nn.Module) -> list[str]:
    """Names of subnets that a backward pass of a text's loss leaves without a gradient."""
    ids = torch.arange(3, 35).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    return [layer.name for layer in find_sites(model) if layer.subnet.grad is None]


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_all_that_trains_beside_an_indexer_gets_a_gradient(kind):
    model = get_losia_model(build(kind, **SMALL | SPARSE | {"num_hidden_layers": 4}), LoSiAConfig(rank_factor=0.25))
    assert {"o_proj", "gate_up_proj"} <= {layer.name.rsplit(".", 1)[1] for layer in find_sites(model)}
    assert not [layer.name for layer in find_sites(model) if "indexer" in layer.name]
    assert not without_gradient(model)


def test_what_is_suggested_beside_a_special_kind_of_layer_trains_and_names_the_experts():
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    settings = SMALL | SPARSE | {"num_hidden_layers": 4, "compress_rates": rates}
    with pytest.raises(ConfigError, match="DeepseekV4GroupedLinear") as refused:
        get_losia_model(build("deepseek_v4", **settings), LoSiAConfig())
    suggested = ast.literal_eval(re.search(r"target_modules=(\[.*\])", str(refused.value)).group(1))
    model = get_losia_model(build("deepseek_v4", **settings), LoSiAConfig(rank_factor=0.25, target_modules=suggested))
    assert {"o_b_proj", "gate_up_proj"} <= {layer.name.rsplit(".", 1)[1] for layer in find_sites(model)}
    assert not without_gradient(model)


@pytest.mark.parametrize(
    "kind, settings, left_out, why",
    [
        ("mamba", {**SMALL, "state_size": 4, "time_step_rank": 4}, "dt_proj", "weight read by MambaMixer itself"),
        ("bart", SEQ2SEQ, "encoder_attn", "attends to another model's output, and this one stands alone"),
    ],
)
def test_all_linear_leaves_out_with_a_line_what_gets_no_gradient(kind, settings, left_out, why, caplog):
    with caplog.at_level(logging.WARNING, "losia_dist"):
        model = get_losia_model(build(kind, **settings), LoSiAConfig(rank_factor=0.25))
    assert find_sites(model) and not without_gradient(model)
    assert not [layer.name for layer in find_sites(model) if left_out in layer.name]
    assert re.search(rf"all-linear leaves out .*{left_out}.*no gradient would come: each .*{why}", caplog.text)


class Asks(nn.Module):
    """Looks at its layer's weight, as T5 does (isinstance), and calls the layer all the same."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(16, 16)
        self.wi = nn.Linear(16, 16)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and torch.is_tensor(self.wi.weight):
            x = x + torch.zeros_like(self.wi.weight).sum()
        return self.wo(self.wi(x))


def test_a_weight_that_is_only_looked_at_is_trained_with_fused_kernels_installed_too(monkeypatch):
    monkeypatch.setattr("losia_dist.subnet.reach.importlib.util.find_spec", lambda name: object())
    model = get_losia_model(nn.Sequential(Asks()), LoSiAConfig(rank_factor=0.25))
    assert {layer.name for layer in find_sites(model)} == {"0.wo", "0.wi"}


def test_a_layer_that_never_gets_a_gradient_is_refused_by_name_too():
    for kind, settings, name, why in [
        ("glm_moe_dsa", SMALL | SPARSE, "wq_b", "runs without gradients"),
        ("mamba", {**SMALL, "state_size": 4, "time_step_rank": 4}, "dt_proj", "past the layer"),
    ]:
        with pytest.raises(ConfigError, match=rf"{name}' gets no gradient: it .*{why}"):
            get_losia_model(build(kind, **settings), LoSiAConfig(rank_factor=0.25, target_modules=[name]))


def test_block_diagonal_gates_are_no_experts_and_stay_frozen_with_a_line(caplog):
    with caplog.at_level(logging.WARNING, "losia_dist"):
        model = get_losia_model(build("recurrent_gemma", **SMALL | RECURRENT), LoSiAConfig(rank_factor=0.25))
    assert not without_gradient(model)
    assert re.search(r"rg_lru\.input_gate_weight.*hold several matrices each and are no linear layers.*frozen", caplog.text)


class OfItsOwn(nn.Linear):
    """A kind of linear layer that holds no subnet."""

    def forward(self, x):
        return 2 * super().forward(x)


class Shared(nn.Module):
    """Two layers of one name, one of which only chooses."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"q_proj": nn.Linear(16, 16)})
        self.indexer = nn.ModuleDict({"q_proj": nn.Linear(16, 16)})
        self.experts = nn.ModuleList(OfItsOwn(16, 16) for _ in range(2))


def test_a_suggested_name_matches_nothing_that_was_left_out():
    with pytest.raises(ConfigError, match=r"target_modules=\['attention\.q_proj'\]"):
        get_losia_model(Shared(), LoSiAConfig())


def test_of_a_mixture_of_experts_that_sees_the_language_model_trains():
    """Its vision tower has layers of the same names."""
    text = {**SMALL, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "model_type": "qwen3_moe"}
    tower = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llava", text_config=text, vision_config={**tower, "num_attention_heads": 4, "image_size": 8})
    config.vision_config.patch_size = 4
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    layers = find_sites(get_losia_model(model, LoSiAConfig(rank_factor=0.25)))
    ends = {layer.name.rsplit(".", 1)[1] for layer in layers}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert all("language_model" in layer.name for layer in layers)


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        y = self.linear(x)
        y += 1
        return functional.relu_(y)


def test_what_a_layer_gives_may_be_changed_in_place():
    torch.manual_seed(0)
    plain = ChangesItsInput()
    model = get_losia_model(copy.deepcopy(plain), LoSiAConfig(rank_factor=1))
    x = torch.randn(2, 3, 16)
    for module in (plain, model):
        module(x).square().sum().backward()
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.linear.subnet.grad, plain.linear.weight.grad)
