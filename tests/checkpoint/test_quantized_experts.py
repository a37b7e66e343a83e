"""Runs over quantized experts: saved, resumed, moved to other engines, and exported under the names of the original's files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from losia_dist import (
    Drawn,
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    apply_delta,
    export_model,
    get_losia_model,
    load_checkpoint,
    losia_parameter_groups,
    save_checkpoint,
    save_delta,
)
from losia_dist.checkpoint.tensor_names import contents_of
from losia_dist.errors import CheckpointError
from losia_dist.export.offline import ExportedWeights
from losia_dist.export.onto import computing_onto
from tests.checkpoint.test_quantized import TOKENS, train
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.families import tiny_model
from tests.support.quantized import dequantized, quantize, save_in_fp8

CONFIG = {"rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "experts_per_slot": 2, "train_norms": True}
RUN = replace(runs.RUN, family="mixture:qwen3_moe", steps=14, config=CONFIG, quantized="nf4:double:experts")
STEP = 9  # inside a slot, after subnets of all groups have moved


@pytest.mark.parametrize(
    "engine, world, form",
    [("one", 1, "nf4"), slow("fsdp2", 2, "nf4"), slow("zero3", 2, "nf4"), slow("ddp", 2, "nf4")]
    + [slow("one", 1, "stochastic"), slow("fsdp2", 2, "stochastic"), slow("zero3", 2, "stochastic"), slow("one", 1, "int8")],
)
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, engine, world, form):
    own = {"selection": "random", "experts_per_slot": "auto"} if form == "stochastic" else {}
    run = replace(RUN, config={**CONFIG, "retired": form, **own})
    expected = ranks(world, runs.train_and_save, engine, run, tmp_path, (2, STEP))
    for result, undisturbed in zip(ranks(world, runs.resume, engine, run, tmp_path, None), expected, strict=True):
        assert result["first"] == STEP
        runs.assert_equal(result, undisturbed)


@pytest.mark.parametrize("source, target", [slow("fsdp2", "zero3"), slow("one", "fsdp2"), slow("zero3", "one")])
def test_a_run_goes_on_on_another_engine(ranks, tmp_path, source, target):
    run = replace(RUN, config={**CONFIG, "retired": "fp32"})
    ranks(1 if source == "one" else 2, runs.train_and_save, source, run, tmp_path, (STEP,))
    undisturbed = ranks(1, runs.train_and_save, "one", run, None, ())[0]
    for result in ranks(1 if target == "one" else 2, runs.resume, target, run, tmp_path, None):
        runs.assert_equal(result, undisturbed, 1e-5)


def made(family: str = "qwen3_moe", form: str = "nf4:double:experts", sizes=None, **config):
    model = quantize(tiny_model(f"mixture:{family}", **(sizes or {})), form)
    settings = LoSiAConfig(**{"rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "selection": Drawn(), **config})
    get_losia_model(model, settings)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    return {"model": model, "optimizer": optimizer, "losia": LoSiA(model, optimizer, settings)}


def loss_of(model) -> float:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, labels=TOKENS).loss.item()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_exports_are_what_trained_or_the_original_with_what_changed_under_its_names(tmp_path, family):
    original = tiny_model(f"mixture:{family}")
    original.save_pretrained(tmp_path / "original")
    run = made(family)
    train(run, 5)
    save_checkpoint(tmp_path / "run", **run)
    exports = {}
    for kind, source in (("live", run["losia"]), ("saved", tmp_path / "run")):
        for onto in (False, True):
            place = tmp_path / f"{kind}-{onto}"
            export_model(source, place, base_model=tmp_path / "original", onto=onto)
            exports[kind, onto] = load_file(place / "model.safetensors")
    base = load_file(tmp_path / "original" / "model.safetensors")
    for found in exports.values():
        assert found.keys() == base.keys() and all(found[name].shape == base[name].shape for name in base)
    for name in base:
        assert torch.equal(exports["live", False][name], exports["saved", False][name]), name
        torch.testing.assert_close(exports["live", True][name], exports["saved", True][name], rtol=0, atol=1e-6, msg=name)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "live-False", attn_implementation="eager", experts_implementation="eager"
    )
    assert loss_of(loaded) == pytest.approx(loss_of(run["model"]), abs=1e-5)
    # Onto the original, each weight differs from it as the trained one does from its codes.
    plain, changed = dequantized(quantize(tiny_model(f"mixture:{family}"), "nf4:double:experts")), 0
    onto = AutoModelForCausalLM.from_pretrained(
        tmp_path / "live-True", attn_implementation="eager", experts_implementation="eager"
    )
    for site in run["losia"].sites:
        name = site.name if site.experts is not None else f"{site.name}.weight"
        trained = run["losia"].parameters.read_whole(site.weight)
        change = onto.get_parameter(name) - original.get_parameter(name)
        torch.testing.assert_close(change, trained - plain.get_parameter(name), rtol=0, atol=1e-6)
        changed += bool(change.abs().max() > 1e-3)
    assert changed == len(run["losia"].sites)
    before = loss_of(run["model"])
    with computing_onto(run["losia"], tmp_path / "original"):
        assert loss_of(run["model"]) == pytest.approx(loss_of(onto), abs=1e-5)
    assert loss_of(run["model"]) == before != loss_of(onto)
    file = save_delta(tmp_path / "run", tmp_path / "delta.safetensors", tmp_path / "original")
    apply_delta(file, tmp_path / "original", tmp_path / "applied")
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    assert all(torch.equal(applied[name], exports["saved", True][name]) for name in base)
    weights = ExportedWeights(tmp_path / "run", tmp_path / "original", onto=True)
    assert any("experts" in name and weights.source_of(name) for name in base) == (family == "gpt_oss")
    for name in [name for name in base if name.endswith("_proj") and weights.source_of(name)]:
        differs = (exports["saved", True][name] != base[name]).view(-1, base[name].shape[-1])
        for first, second in weights.blocks(name):
            differs[first[:, None], second] = False
        assert not differs.any(), name


def test_a_checkpoint_over_experts_in_fp8_is_exported_from_the_codes_in_the_bases_files(tmp_path):
    sizes = {"moe_intermediate_size": 24}  # whole blocks of 6 rows in a gate, as publishers have them
    run = made(form="fp8:experts", sizes=sizes)
    save_in_fp8(quantize(tiny_model("mixture:qwen3_moe", **sizes), "fp8:experts"), tmp_path / "base")
    train(run, 5)
    save_checkpoint(tmp_path / "run", **run)
    export_model(run["losia"], tmp_path / "live", base_model=tmp_path / "base")
    export_model(tmp_path / "run", tmp_path / "saved", base_model=tmp_path / "base")
    live, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "saved"))
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == live.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    assert any("experts.0.gate_proj" in name for name in saved) and all(torch.equal(saved[name], live[name]) for name in live)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", experts_implementation="eager"
    )
    assert loss_of(loaded) == pytest.approx(loss_of(run["model"]), abs=1e-5)


def test_another_base_is_refused_by_the_experts_name(tmp_path):
    run = made()
    train(run, 3)
    save_checkpoint(tmp_path, **run)
    other = tiny_model("mixture:qwen3_moe")
    other.model.layers[1].mlp.experts.down_proj.data[2] *= -1.5
    settings = LoSiAConfig(rank_factor=0.25, period=2, layers_per_slot=2, selection=Drawn())
    get_losia_model(quantize(other, "nf4:double:experts"), settings)
    optimizer = LoSiAAdamW(losia_parameter_groups(other, lr=1e-2), lr=1e-2)
    losia = LoSiA(other, optimizer, settings)
    with pytest.raises(CheckpointError, match="codes or scales of model.layers.1.mlp.experts.down_proj are not those"):
        load_checkpoint(tmp_path, model=other, optimizer=optimizer, losia=losia)
    plain = made(form="nf4:double")
    with pytest.raises(CheckpointError, match="experts.down_proj is quantized in .*, and not in the other"):
        load_checkpoint(tmp_path, **plain)


def test_a_checkpoint_holds_no_codes_of_experts(tmp_path):
    run = made()
    train(run, 3)
    save_checkpoint(tmp_path, **run)
    held = {name for path in (tmp_path / "base").rglob("*.safetensors") for name in load_file(path)}
    assert held and not any("experts" in name for name in held)
    assert sum("experts" in name for name in contents_of(run["losia"]).quantized) == 4
