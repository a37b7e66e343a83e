"""Every class of the installed Transformers that holds experts: a subnet in each expert, and a plain model again after it."""

import json
from pathlib import Path

import pytest
import torch

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites
from tests.support.cases import only
from tests.support.expert_classes import EXCEPTIONS, build, decorated_classes, logits_of, loss_of, other_classes

CLASSES = {one.name: one for one in (*decorated_classes(), *other_classes()) if one.name not in EXCEPTIONS}
OFTEN = ["GptOssExperts", "MuseSparkExperts", "Llama4TextExperts"]
# What "all-linear" does not stand for, and why.
LAYER = r"model\.(language_model\.)?layers\.\d+\."
SETTINGS = {
    # a head, which has to train as a whole
    "OpenAIPrivacyFilterExperts": {"modules_to_save": ["score"]},
    # a linear layer of a special kind (o_a_proj), and a compressor that so few tokens do not reach
    "DeepseekV4Experts": {"target_modules": LAYER + r"(self_attn\.(q_a|q_b|kv|o_b)|mlp\.experts\.\w+)_proj"},
    # vision_moe, which text alone does not reach
    "Ernie4_5_VLMoeMoeExperts": {
        "target_modules": LAYER + r"(self_attn|mlp|mlp\.text_moe\.experts|mlp\.shared_experts)\.\w+_proj"
    },
}
# Classes whose weights hold no subnet, and what the refusal says.
_BY_NAME = r"would leave the experts of \w+ frozen, .*experts"
REFUSED = {
    "DiffusionGemmaTextExperts": "several parts, and get_decoder",  # two of them, which share all weights
    "JetMoeParallelExperts": _BY_NAME,
    "LongcatFlashExperts": _BY_NAME,
}
# Computes for all tokens, and stays frozen beside the experts that do hold subnets.
FROZEN = ["InklingSharedExperts"]
TAKEN = [name for name in CLASSES if name not in (*REFUSED, *FROZEN)]


@pytest.mark.slow  # 25 s, most of it imports
def test_every_decorated_class_has_a_tiny_model_or_a_reason_not_to():
    found = {one.name for one in decorated_classes()}
    assert len(found) > 50
    assert not EXCEPTIONS.keys() - found, "exceptions that Transformers no longer has"
    with torch.device("meta"):
        for one in CLASSES.values():
            assert build(one) is not None  # LookupError names the class


def names_on_disk(directory: Path) -> set[str]:
    from safetensors import safe_open

    found = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    assert found, sorted(directory.iterdir())
    return found


@torch.no_grad()
def assert_same_logits(model, expected: torch.Tensor) -> None:
    assert (logits_of(model.eval()) - expected).abs().max() < 1e-5 * min(1.0, expected.abs().max())


@pytest.mark.parametrize("name", REFUSED)
def test_experts_that_can_hold_no_subnet_are_refused_by_name(name):
    model = build(CLASSES[name])
    with pytest.raises(ConfigError, match=REFUSED[name]):
        get_losia_model(model, LoSiAConfig(rank_factor=0.25))


@pytest.mark.parametrize("name", FROZEN)
def test_shared_experts_stay_frozen_with_a_line(name, caplog):
    model = get_losia_model(build(CLASSES[name]), LoSiAConfig(rank_factor=0.25))
    assert not [site for site in find_sites(model) if _belongs(model, site, CLASSES[name])]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "shared_experts" in n)
    assert "shared_experts.gate_proj" in caplog.text and "stay frozen" in caplog.text


@pytest.mark.parametrize("which", only(OFTEN, {name: CLASSES[name] for name in TAKEN}))
def test_experts_train_by_subnets_and_leave_as_a_plain_model(which, tmp_path):
    plain = build(which).eval()
    with torch.no_grad():
        before = logits_of(plain)
    plain.save_pretrained(tmp_path / "plain")
    config = LoSiAConfig(rank_factor=0.25, period=2, layers_per_slot=100, **SETTINGS.get(which.name, {}))
    model = get_losia_model(plain, config)
    assert_same_logits(model, before)
    experts = [site for site in find_sites(model) if _belongs(model, site, which)]
    assert experts, f"no subnet in {which}"

    model.train()
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    places = [(site.row_index.clone(), site.col_index.clone()) for site in experts]
    values = [site.subnet.detach().clone() for site in experts]
    for step in range(3):  # a move after the second
        loss_of(model).backward()
        optimizer.step()
        if step == 0:
            assert any(not torch.equal(site.subnet, value) for site, value in zip(experts, values, strict=True))
        losia.step()
        optimizer.zero_grad()
    moved = [not torch.equal(site.row_index, rows) for site, (rows, _) in zip(experts, places, strict=True)]
    assert any(moved)
    losia.consolidate()
    with torch.no_grad():
        trained = logits_of(model.eval())
    assert (trained - before).abs().max() > 1e-3 * before.abs().max()
    export_model(losia, tmp_path / "exported")
    losia.detach()

    assert names_on_disk(tmp_path / "exported") == names_on_disk(tmp_path / "plain")
    written, original = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("exported", "plain"))
    assert written == original
    loaded = type(plain).from_pretrained(tmp_path / "exported", attn_implementation="eager", experts_implementation="eager")
    assert_same_logits(loaded, trained)


def _belongs(model, site, which) -> bool:
    """Whether a site lies in a module of this class, or in one of the experts that such a module is a list of."""
    names = site.name.split(".")
    inside = (model.get_submodule(".".join(names[:end])) for end in range(len(names)))
    return any(which.name in (kind.__name__ for kind in type(module).__mro__) for module in inside)
