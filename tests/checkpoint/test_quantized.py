"""Runs over a quantized base: saved, resumed, moved to other engines, and exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from losia_dist import (
    Drawn,
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    apply_delta,
    export_model,
    get_losia_model,
    losia_parameter_groups,
    save_delta,
)
from losia_dist.checkpoint import layout
from losia_dist.checkpoint.load import load_checkpoint
from losia_dist.checkpoint.quantized import write_quantized
from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.save import save_checkpoint
from losia_dist.errors import CheckpointError, ConfigError
from losia_dist.export.onto import computing_onto
from losia_dist.subnet.packed import packed_weights
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.models import tiny_llama
from tests.support.quantized import dequantized, quantize, save_in_fp8

SIZES = {"hidden_size": 48, "intermediate_size": 80}
CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "train_norms": True}
RUN = replace(runs.RUN, steps=14, model=SIZES, config=CONFIG, quantized="nf4:double")
STEP = 9  # inside a slot, after subnets of all layers have moved
TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize(
    "engine, world, form",
    [("one", 1, "nf4"), slow("zero3", 2, "nf4"), ("fsdp2", 2, "nf4"), slow("ddp", 2, "nf4"), slow("zero2", 2, "nf4")]
    + [("one", 1, "stochastic"), slow("fsdp2", 2, "stochastic"), slow("zero3", 2, "stochastic"), slow("one", 1, "int8")],
)
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, engine, world, form):
    own = {"selection": Drawn()} if form == "stochastic" else {}  # whose noise is the seed's, as drawn subnets are
    run = replace(RUN, config={**CONFIG, "retired": form, **own})
    expected = ranks(world, runs.train_and_save, engine, run, tmp_path, (2, STEP))
    for result, undisturbed in zip(ranks(world, runs.resume, engine, run, tmp_path, None), expected, strict=True):
        assert result["first"] == STEP
        runs.assert_equal(result, undisturbed)


# Kept in fp32, so that equal runs stay equal to rounding: a code of fewer bits may be the next one.
@pytest.mark.parametrize(
    "source, target", [slow("fsdp2", "zero3"), slow("one", "fsdp2"), slow("zero3", "one"), slow("zero2", "fsdp2")]
)
def test_a_run_goes_on_on_another_engine(ranks, tmp_path, source, target):
    run = replace(RUN, config={**CONFIG, "retired": "fp32"})
    ranks(1 if source == "one" else 2, runs.train_and_save, source, run, tmp_path, (STEP,))
    undisturbed = ranks(1, runs.train_and_save, "one", run, None, ())[0]
    for result in ranks(1 if target == "one" else 2, runs.resume, target, run, tmp_path, None):
        runs.assert_equal(result, undisturbed, 1e-5)


def made(form: str = "nf4:double", seed: int = 0, model=None, **config):
    """A model, its optimizer and conductor; its base is another one for another seed, or the given quantized one."""
    if model is None:
        model = tiny_llama(**SIZES)
        if seed:
            model.model.layers[1].mlp.up_proj.weight.data[3, 5] *= -1.5
        quantize(model, form)
    settings = LoSiAConfig(**{"rank_factor": 0.25, "period": 2, "layers_per_slot": 3, "selection": Drawn(), **config})
    get_losia_model(model, settings)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    return {"model": model, "optimizer": optimizer, "losia": LoSiA(model, optimizer, settings)}


def train(run, steps: int) -> None:
    for _ in range(steps):
        run["model"](input_ids=TOKENS, labels=TOKENS).loss.backward()
        run["optimizer"].step()
        run["losia"].step()
        run["optimizer"].zero_grad()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory, run = tmp_path_factory.mktemp("saved"), made()
    train(run, 5)
    save_checkpoint(directory, **run)
    return directory, run


@pytest.mark.parametrize(
    "other, message",
    [
        ({"seed": 1}, "codes or scales of model.layers.1.mlp.up_proj are not those.*Load the same base"),
        ({"form": "nf4"}, "down_proj with double True, and this run has False"),
        ({"form": "fp4:double"}, "down_proj with kind nf4, and this run has fp4"),
        ({"retired": "int8"}, "down_proj with retired nf4, and this run has int8"),
    ],
)
def test_another_base_is_refused_and_nothing_is_changed(saved, other, message):
    run = made(**other)
    before = run["model"](TOKENS).logits
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved[0], **run)
    assert torch.equal(run["model"](TOKENS).logits, before)


def test_codes_in_another_storage_are_the_same_base(saved):
    run = made(form="nf4:bfloat16:double")
    load_checkpoint(saved[0], **run)
    assert torch.equal(run["model"](TOKENS).logits, saved[1]["model"](TOKENS).logits)


def test_scales_that_differ_in_the_last_digit_are_the_same_base(saved):
    """As bitsandbytes makes them on another device, or with another number of threads (the mean of a layer's scales)."""
    run, directory = made(), saved[0]
    for module in packed_weights(run["model"]).values():
        state = module.packed._state
        state.offset = torch.nextafter(state.offset, torch.ones(()))
        state.state2.absmax = torch.nextafter(state.state2.absmax, torch.zeros(()))
    load_checkpoint(directory, **run)
    torch.testing.assert_close(run["model"](TOKENS).logits, saved[1]["model"](TOKENS).logits, rtol=0, atol=1e-4)
    other = made()
    next(iter(packed_weights(other["model"]).values())).packed._state.offset.mul_(1.01)
    with pytest.raises(CheckpointError, match="the codes or scales of .* are not those"):
        load_checkpoint(directory, **other)


@pytest.mark.parametrize("retired", ["nf4", "stochastic"])
def test_a_run_goes_back_to_before_its_first_move(tmp_path, retired):
    run = made(retired=retired)
    train(run, 1)
    save_checkpoint(tmp_path, **run)
    before = run["model"](TOKENS).logits
    train(run, 5)
    load_checkpoint(tmp_path, **run)
    assert torch.equal(run["model"](TOKENS).logits, before)


def test_what_subnets_left_is_loaded_onto_the_device_that_computes(saved):
    model = made()["model"].to("meta")
    layers = packed_weights(model)
    write_quantized(None, layers, Reader(layout.find(saved[0], None)))
    left = [one for module in layers.values() for one in module.packed.overlay.read()]
    assert left and all(one.codes.is_meta and one.scales.is_meta for one in left)


def test_a_checkpoint_holds_no_codes_of_the_base(saved):
    layers = sum(site.weight.nbytes for site in saved[1]["losia"].sites)
    held = sum(path.stat().st_size for path in (saved[0] / "base").rglob("*.safetensors"))
    others = sum(p.nbytes for n, p in saved[1]["model"].named_parameters() if "subnet" not in n) - layers
    assert held < others + 8192 < layers + others


@pytest.mark.parametrize("form", ["nf4:double", "int8", "fp8"])
def test_what_is_exported_is_what_trained(tmp_path, form):
    run = made(form)
    train(run, 5)
    export_model(run["losia"], tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    run["model"].eval()
    assert torch.equal(loaded(TOKENS).logits, run["model"](TOKENS).logits)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    # Exporting changes nothing.
    again = made(form)
    train(again, 5)
    train(again, 2), train(run, 2)
    assert torch.equal(again["model"](TOKENS).logits, run["model"](TOKENS).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_a_model_that_is_cast_after_it_was_converted_is_exported_in_one_dtype(tmp_path, original, targets):
    model = quantize(tiny_llama(**SIZES), "nf4:double")
    settings = LoSiAConfig(rank_factor=0.25, period=2, layers_per_slot=3, selection=Drawn(), target_modules=targets)
    get_losia_model(model, settings).to(torch.bfloat16)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    run = {"model": model, "optimizer": optimizer, "losia": LoSiA(model, optimizer, settings)}
    train(run, 5)
    save_checkpoint(tmp_path / "run", **run)
    export_model(run["losia"], tmp_path / "live")
    export_model(tmp_path / "run", tmp_path / "saved", base_model=original)
    live, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "saved"))
    assert {tensor.dtype for tensor in live.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[name], live[name]) for name in live)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "live", attn_implementation="eager", dtype=torch.bfloat16)
    loaded.model.rotary_emb = model.model.rotary_emb  # whose buffers were cast too
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_a_cast_run_goes_on_over_a_base_that_was_loaded_in_that_dtype(tmp_path):
    settings, runs_of = LoSiAConfig(rank_factor=0.25, period=2, layers_per_slot=3, selection=Drawn()), []
    for loaded_so in (False, True):
        model = quantize(tiny_llama(**SIZES), "nf4:double")
        for module in model.modules():
            if loaded_so and hasattr(module, "weight") and hasattr(module.weight, "quant_state"):
                module.weight.quant_state.dtype = torch.bfloat16
        get_losia_model(model, settings).to(torch.bfloat16)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
        runs_of.append({"model": model, "optimizer": optimizer, "losia": LoSiA(model, optimizer, settings)})
    train(runs_of[0], 3)
    save_checkpoint(tmp_path, **runs_of[0])
    load_checkpoint(tmp_path, **runs_of[1])
    assert torch.equal(runs_of[1]["model"](TOKENS).logits, runs_of[0]["model"](TOKENS).logits)


def test_a_model_that_was_stored_in_4_bits_goes_on_as_one_quantized_while_loading_and_is_exported(tmp_path, original):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = AutoModelForCausalLM.from_pretrained(original, quantization_config=settings, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "stored")
    run = made(model=loaded)
    train(run, 3)
    save_checkpoint(tmp_path / "run", **run)
    stored = made(model=AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype=torch.float32))
    load_checkpoint(tmp_path / "run", **stored)
    export_model(stored["losia"], tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(exported(TOKENS).logits, run["model"].eval()(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The model that was quantized, as its makers would publish it."""
    directory = tmp_path_factory.mktemp("original")
    tiny_llama(**SIZES).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "form, retired", [("nf4:double", "nf4"), ("nf4:double", "stochastic"), ("int8", "nf4"), slow("int8", "stochastic")]
)
def test_a_checkpoint_is_exported_as_the_live_run_is(tmp_path, original, form, retired):
    run = made(form, retired=retired)
    train(run, 5)
    save_checkpoint(tmp_path / "run", **run)
    for onto in (False, True):
        export_model(tmp_path / "run", tmp_path / f"saved-{onto}", base_model=original, onto=onto)
        if onto and retired == "stochastic":
            with pytest.raises(ConfigError, match="whose first values this run no longer has. Save a checkpoint"):
                export_model(run["losia"], tmp_path / "live-True", base_model=original, onto=True)
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved-True", attn_implementation="eager")
            continue
        export_model(run["losia"], tmp_path / f"live-{onto}", base_model=original, onto=onto)
        live, saved = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-{onto}", attn_implementation="eager")
            for kind in ("live", "saved")
        )
        for (name, one), other in zip(live.named_parameters(), saved.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if onto else 0, msg=name)
    # Onto the original, each weight differs from it as the trained one does from its codes.
    base, plain = tiny_llama(**SIZES), dequantized(quantize(tiny_llama(**SIZES), form))
    for site in run["losia"].sites:
        trained = run["losia"].parameters.read_whole(site.weight)
        change = saved.get_submodule(site.name).weight - base.get_submodule(site.name).weight
        expected = trained - plain.get_submodule(site.name).weight
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)


def evaluated_onto(engine, run, original, directory):
    """Mean loss of the first batch: before, while the model computes onto its original, after that; and of what is exported."""
    losia, stepper, close = runs.start(engine, run)
    runs.train_on(losia, stepper, run, run.steps)
    batch = runs.global_batches(run)[0][0]

    def loss(model):
        with torch.no_grad():
            return model(**batch, use_cache=False).loss.item()

    model = losia.model.eval()
    found = [loss(model)]
    with computing_onto(losia, original):
        found.append(loss(model))
    found.append(loss(model))
    export_model(losia, directory, base_model=original, onto=True)
    close()
    return found, loss(AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager"))


@pytest.mark.parametrize(
    "engine, form", [("one", "nf4:double"), ("one", "int8"), ("fsdp2", "nf4:double"), slow("zero3", "nf4")]
)
def test_a_model_computes_onto_its_original_for_a_while(ranks, tmp_path, original, engine, form):
    run = replace(RUN, steps=6, quantized=form, config={**CONFIG, "selection": Drawn()})
    for (before, onto, after), exported in ranks(1 if engine == "one" else 2, evaluated_onto, engine, run, original, tmp_path):
        assert before == after and abs(onto - before) > 1e-4
        assert onto == pytest.approx(exported, abs=1e-5)


def test_a_delta_of_a_quantized_run_is_what_changed_and_leads_to_the_model_onto_its_original(tmp_path, original):
    run = made()
    train(run, 5)
    save_checkpoint(tmp_path / "run", **run)
    file = save_delta(tmp_path / "run", tmp_path / "delta.safetensors", original)
    apply_delta(file, original, tmp_path / "applied")
    export_model(tmp_path / "run", tmp_path / "onto", base_model=original, onto=True)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("applied", "onto"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert file.stat().st_size < 0.6 * (original / "model.safetensors").stat().st_size


def test_exports_that_cannot_be_made_are_refused(tmp_path, original, saved):
    directory, run = saved
    with pytest.raises(CheckpointError, match="of which it holds the print alone: give base_model"):
        export_model(directory, tmp_path / "a")
    other = tiny_llama(**SIZES)
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="codes of model.layers.0.mlp.up_proj made from .* are not those of the run"):
        export_model(directory, tmp_path / "a", base_model=tmp_path / "other")
    with pytest.raises(ConfigError, match="onto=True needs base_model"):
        export_model(run["losia"], tmp_path / "a", onto=True)
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_over_fp8_is_exported_from_the_codes_in_the_bases_files(tmp_path):
    base = quantize(tiny_llama(**SIZES), "fp8")
    save_in_fp8(base, tmp_path / "base")
    for retired in ("int8", "stochastic"):
        run = made(model=quantize(tiny_llama(**SIZES), "fp8"), retired=retired)
        train(run, 5)
        save_checkpoint(tmp_path / retired, **run)
        export_model(run["losia"], tmp_path / f"live-{retired}")
        export_model(tmp_path / retired, tmp_path / f"saved-{retired}", base_model=tmp_path / "base")
        live, saved = (load_file(tmp_path / f"{kind}-{retired}" / "model.safetensors") for kind in ("live", "saved"))
        assert live.keys() == saved.keys() and all(torch.equal(saved[name], live[name]) for name in live)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"saved-{retired}", attn_implementation="eager")
        assert torch.equal(loaded(TOKENS).logits, run["model"].eval()(TOKENS).logits)


def test_exports_over_fp8_that_cannot_be_made_are_refused(tmp_path, original):
    run = made("fp8")
    train(run, 3)
    save_checkpoint(tmp_path / "run", **run)
    other = tiny_llama(**SIZES)
    other.model.layers[0].mlp.up_proj.weight.data[3, 5] *= -1.5
    save_in_fp8(quantize(other, "fp8"), tmp_path / "other")
    for base, onto, message in (
        (tmp_path / "other", False, "codes of model.layers.0.mlp.up_proj made from .* are not those of the run"),
        (original, False, "has model.layers.0.* in torch.float32: give the directory of the FP8 model that was loaded"),
        (tmp_path / "other", True, "a base in FP8, whose files hold codes and no original"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_model(tmp_path / "run", tmp_path / "a", base_model=base, onto=onto)
    with pytest.raises(CheckpointError, match="no original to add to.*without --onto_base and --delta"):
        save_delta(tmp_path / "run", tmp_path / "delta.safetensors", tmp_path / "other")
    with pytest.raises(CheckpointError, match="_proj.weight in .* in float8_e4m3fn: the original's weights are needed"):
        export_model(run["losia"], tmp_path / "a", base_model=tmp_path / "other", onto=True)
    assert not (tmp_path / "a").exists()
