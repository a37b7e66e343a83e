"""Experts and routers that are not quite what their family has: refused with the fix, or trained without what cannot train."""

import pytest
from torch import nn

from losia_dist import LoSiAConfig, get_losia_model
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites
from tests.support.expert_classes import build, decorated_classes, other_classes
from tests.support.families import tiny_model

CLASSES = {one.name: one for one in (*decorated_classes(), *other_classes())}


def refusal(model: nn.Module, **settings) -> str:
    """The message that a model is refused with; it must be left as it was."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError) as caught:
        get_losia_model(model, LoSiAConfig(rank_factor=0.25, **settings))
    assert not find_sites(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    return str(caught.value)


def doubled(kind: type) -> type:
    return type("Doubled", (kind,), {"forward": lambda self, *args: kind.forward(self, *args) * 2})


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "Llama4TextExperts", "DbrxExpertGLU"])
def test_experts_whose_class_computes_in_its_own_way_are_refused(name):
    model = build(CLASSES[name])
    experts = [module for path, module in model.named_modules() if path.endswith(".experts")]
    assert experts
    for module in experts:
        module.__class__ = doubled(type(module))
    assert "Doubled computes by a forward of its own" in refusal(model)


def test_a_fused_weight_that_two_modules_hold_is_refused():
    model = tiny_model("mixture:qwen3_moe")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    assert "share a weight" in refusal(model)
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, target_modules=["q_proj", "experts.gate_up_proj"]))


@pytest.mark.parametrize("whole_is_frozen", [False, True])
@pytest.mark.parametrize("name", ["Ernie4_5_MoeExperts", "LagunaExperts"])
def test_what_shifts_the_choice_of_experts_stays_frozen_where_routers_train(name, whole_is_frozen):
    model = build(CLASSES[name])
    biases = [name for name, _ in model.named_parameters() if name.endswith("correction_bias")]
    if whole_is_frozen:
        model.requires_grad_(False)
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, router_lr_scale=0.1))
    assert biases and not any(model.get_parameter(one).requires_grad for one in biases)
    routers = [p for path, p in model.named_parameters() if ".gate." in path and path.endswith("weight")]
    assert any(p.requires_grad for p in routers)


def test_a_router_inside_a_module_that_trains_in_full_has_one_rate():
    message = refusal(tiny_model("mixture:qwen3_moe"), router_lr_scale=0.1, modules_to_save=["mlp"])
    assert "both name 'model.layers.0.mlp.gate'" in message


def test_experts_under_a_torch_without_grouped_products_are_refused(monkeypatch):
    monkeypatch.delattr("torch.nn.functional.grouped_mm", raising=False)
    assert "install torch 2.10 or newer" in refusal(tiny_model("mixture:qwen3_moe"))
