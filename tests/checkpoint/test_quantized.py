"""Runs over a quantized base: saved, resumed, moved to other engines, and exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups
from losia_dist.checkpoint.load import load_checkpoint
from losia_dist.checkpoint.save import save_checkpoint
from losia_dist.errors import CheckpointError
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.models import tiny_llama
from tests.support.quantized import quantize

SIZES = {"hidden_size": 48, "intermediate_size": 80}
CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "train_norms": True}
RUN = replace(runs.RUN, steps=14, model=SIZES, config=CONFIG, quantized="nf4:double")
STEP = 9  # inside a slot, after subnets of all layers have moved
TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize(
    "engine, world, form",
    [("one", 1, "nf4"), ("zero3", 2, "nf4"), ("fsdp2", 2, "nf4"), slow("ddp", 2, "nf4"), slow("zero2", 2, "nf4")]
    + [("one", 1, "stochastic"), ("fsdp2", 2, "stochastic"), slow("zero3", 2, "stochastic"), slow("one", 1, "int8")],
)
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, engine, world, form):
    own = {"selection": Drawn()} if form == "stochastic" else {}  # whose noise is the seed's, as drawn subnets are
    run = replace(RUN, config={**CONFIG, "retired": form, **own})
    expected = ranks(world, runs.train_and_save, engine, run, tmp_path, (2, STEP))
    for result, undisturbed in zip(ranks(world, runs.resume, engine, run, tmp_path, None), expected, strict=True):
        assert result["first"] == STEP
        runs.assert_equal(result, undisturbed)


# Kept in fp32, so that equal runs stay equal to rounding: a code of fewer bits may be the next one.
@pytest.mark.parametrize("source, target", [("one", "fsdp2"), ("fsdp2", "zero3"), slow("zero3", "one"), slow("zero2", "fsdp2")])
def test_a_run_goes_on_on_another_engine(ranks, tmp_path, source, target):
    run = replace(RUN, config={**CONFIG, "retired": "fp32"})
    ranks(1 if source == "one" else 2, runs.train_and_save, source, run, tmp_path, (STEP,))
    undisturbed = ranks(1, runs.train_and_save, "one", run, None, ())[0]
    for result in ranks(1 if target == "one" else 2, runs.resume, target, run, tmp_path, None):
        runs.assert_equal(result, undisturbed, 1e-5)


def made(form: str = "nf4:double", seed: int = 0, **config):
    """A model, its optimizer and conductor; its base is another one for another seed."""
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
        ({"seed": 1}, "codes of model.layers.1.mlp.up_proj are not those.*Load the same base"),
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
