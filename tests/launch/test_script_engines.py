"""The script's engines and features on the pool's ranks, without a launcher: one trajectory, whatever holds the model."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from losia_dist import LoSiAConfig
from losia_dist.errors import ConfigError, DivergenceError
from losia_dist.recipe import script
from losia_dist.recipe.environment import find_process
from losia_dist.recipe.fsdp import _layers
from losia_dist.recipe.options import add_training_arguments
from losia_dist.recipe.preset import choose_preset, learning_rate_for
from losia_dist.subnet.packed import packed_weights
from tests.launch.conftest import zero
from tests.support.cases import only
from tests.support.families import tiny_model
from tests.support.launching import arguments


def options_of(words):
    return add_training_arguments(argparse.ArgumentParser()).parse_args(words)


def train(words):
    """One run on this pool's ranks, or on this process alone. Returns the summary, and how the weights were kept."""
    agreement_group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    process = find_process() if dist.is_initialized() else replace(find_process(), rank=0, world_size=1)
    kept = {}
    start = script._start

    def watched(*args):
        kept["before"] = {p.device.type for p in args[0].parameters()}
        kept["codes"] = sum(0 if one.weight.is_meta else one.weight.nbytes for one in packed_weights(args[0]).values())
        kept["read"] = sum(0 if p.is_meta else p.nbytes for p in args[0].parameters())
        run = start(*args)
        parameters = list(run.model.parameters())
        kept["sharded"] = all(isinstance(p, DTensor) for p in parameters)
        kept["local"] = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
        kept["whole"] = sum(p.numel() for p in parameters)
        return run

    script._start = watched
    try:
        summary = script.train(options_of(words), process, agreement_group)
    finally:
        script._start = start
    return summary, kept


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory):
    """The run of one process with the same options."""
    kept = {}

    def of(**options):
        key = json.dumps(options, default=str, sort_keys=True)
        if key not in kept:
            directory = tmp_path_factory.mktemp("alone")
            kept[key] = (train(arguments(material, directory, **{"micro_batch": 4, **options}))[0], directory)
        return kept[key]

    return of


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


FULL = {"losia": None, "losia_config": None, "learning_rate": 1e-3}
CASES = {
    "FSDP2 without resharding, accumulation": (
        {"sharding": "fsdp2-no-reshard", "micro_batch": 1, "gradient_accumulation": 2},
        {},
    ),
    "FSDP2, offload": ({"sharding": "fsdp2", "offload": True, "eval_steps": 3}, {}),
    "FSDP2, checkpointing": ({"sharding": "fsdp2", "gradient_checkpointing": "non-reentrant"}, {}),
    "FSDP2, smaller units": ({"sharding": "fsdp2", "shard_layers": ["LlamaDecoderLayer", "LlamaMLP", "Embedding"]}, {}),
    "FSDP2, chunked loss": ({"sharding": "fsdp2", "loss": "chunked", "loss_chunk": 37}, {}),
    "DDP, reentrant checkpointing": ({"gradient_checkpointing": "reentrant"}, {}),
    "full fine-tuning, FSDP2": ({"sharding": "fsdp2"}, FULL),
    "full fine-tuning, FSDP2 without resharding": ({"sharding": "fsdp2-no-reshard", "eval_steps": 2}, FULL),
    "full fine-tuning, DDP, reentrant": ({"gradient_checkpointing": "reentrant"}, FULL),
    "full fine-tuning, ZeRO-1": ({"deepspeed": zero(1)}, FULL),
    "full fine-tuning, ZeRO-2": ({"deepspeed": zero(2)}, FULL),
    "full fine-tuning, ZeRO-3": ({"deepspeed": zero(3)}, FULL),
    "packing": ({}, {"packing": True, "max_length": 96, "max_steps": 6}),
    "packing, FSDP2": ({"sharding": "fsdp2"}, {"packing": True, "max_length": 96, "max_steps": 6}),
}
OFTEN = ["full fine-tuning, FSDP2", "full fine-tuning, ZeRO-3", "packing, FSDP2", "FSDP2, chunked loss", "FSDP2, smaller units"]


@pytest.mark.parametrize("case", only(OFTEN, CASES))
def test_two_ranks_equal_one_process(ranks, alone, material, tmp_path, case):
    own, shared = case
    expected, directory = alone(**shared)
    (summary, kept), (_, kept_by_other) = ranks(2, train, arguments(material, tmp_path, **shared, **own))
    assert losses(tmp_path) == pytest.approx(losses(directory), abs=1e-5)
    assert summary["method"] == ("full" if "losia" in shared else "losia")
    assert summary["held_out_loss_after"] == pytest.approx(expected["held_out_loss_after"], abs=1e-5)
    assert kept["sharded"] == ("sharding" in own)
    if kept["sharded"]:
        assert kept["local"] < 0.6 * kept["whole"]
        assert kept["before"] == kept_by_other["before"] == {"meta"}  # each rank reads its part
    saved, reference = (AutoModelForCausalLM.from_pretrained(d / "model", dtype=torch.float32) for d in (tmp_path, directory))
    assert saved.config.use_cache == reference.config.use_cache is True
    for (name, weight), other in zip(saved.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-5), name


@pytest.mark.parametrize("own", only(["FSDP2"], {"FSDP2": {"sharding": "fsdp2"}, "DDP": {}, "ZeRO-3": {"deepspeed": zero(3)}}))
def test_a_quantized_base_on_two_ranks_equals_one_process(ranks, alone, material, tmp_path, own):
    config = tmp_path / "losia.yaml"
    config.write_text("rank_factor: 0.25\nperiod: 2\nselection: random\nretired: fp32\n")  # fewer bits would tell 1e-7 apart
    shared = {"losia_config": config, "quantization": "int8"}
    expected, directory = alone(**shared)
    summary = ranks(2, train, arguments(material, tmp_path / "two", **shared, **own))[0][0]
    assert losses(tmp_path / "two") == pytest.approx(losses(directory), abs=1e-5)
    assert summary["held_out_loss_after"] == pytest.approx(expected["held_out_loss_after"], abs=1e-5)
    saved, reference = (AutoModelForCausalLM.from_pretrained(d / "model") for d in (tmp_path / "two", directory))
    for (name, weight), other in zip(saved.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-5), name


@pytest.fixture(scope="module")
def mixture(material, tmp_path_factory):
    """A mixture of experts for the material's tokenizer."""
    directory = tmp_path_factory.mktemp("mixture") / "model"
    shutil.copytree(material["model"], directory)
    vocabulary = LlamaConfig.from_pretrained(directory).vocab_size
    tiny_model("qwen3_moe", vocab_size=vocabulary, num_experts=5).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("own", only(["FSDP2"], {"FSDP2": {"sharding": "fsdp2"}, "DDP": {}, "ZeRO-3": {"deepspeed": zero(3)}}))
def test_experts_quantized_while_they_are_read_train_on_two_ranks_as_on_one(ranks, alone, mixture, material, tmp_path, own):
    config = tmp_path / "losia.yaml"
    config.write_text("rank_factor: 0.25\nperiod: 2\nselection: random\nretired: fp32\n")
    shared = {"model": mixture, "losia_config": config, "quantization": "nf4", "max_steps": 4}
    expected, directory = alone(**shared)
    (summary, kept), (_, kept_by_other) = ranks(2, train, arguments(material, tmp_path / "two", **shared, **own))
    assert losses(tmp_path / "two") == pytest.approx(losses(directory), abs=1e-5)
    assert summary["held_out_loss_after"] == pytest.approx(expected["held_out_loss_after"], abs=1e-5)
    if own:  # each rank will keep a part: the first one sends its codes, and the others hold none
        assert kept["codes"] > 0 and kept_by_other["codes"] == 0
        assert kept_by_other["read"] <= kept["read"] - kept["codes"]
    else:
        assert kept["codes"] == kept_by_other["codes"] > 0
    original, saved, reference = (
        load_file(place / "model.safetensors") for place in (mixture, tmp_path / "two" / "model", directory / "model")
    )
    assert original.keys() == saved.keys()
    for name, weight in saved.items():
        assert torch.allclose(weight, reference[name], atol=1e-5), name
        if ".experts." in name:  # the values of codes, and not the file's but for a subnet
            assert (weight != original[name]).float().mean() > 0.8


def test_the_better_of_what_trained_and_its_changes_onto_the_original_is_written(material, tmp_path):
    shared = {"quantization": "int8", "max_steps": 4}
    for export in ("trained", "onto", "better"):
        summary, _ = train(arguments(material, tmp_path / export, **shared, export=export))
    trained, onto = (summary[key] for key in ("held_out_loss_after", "held_out_loss_onto_original"))
    models = {
        d: AutoModelForCausalLM.from_pretrained(tmp_path / d / "model").state_dict() for d in ("trained", "onto", "better")
    }
    better = models["onto" if onto < trained else "trained"]
    assert all(torch.equal(models["better"][name], better[name]) for name in better)
    assert not torch.equal(
        models["trained"]["model.layers.0.mlp.up_proj.weight"], models["onto"]["model.layers.0.mlp.up_proj.weight"]
    )


def test_quantization_that_cannot_be_is_refused(material, tmp_path):
    with pytest.raises(ConfigError, match="--quantization nf4 works with --losia only"):
        train(arguments(material, tmp_path, quantization="nf4", losia=None, losia_config=None))
    with pytest.raises(ConfigError, match="--export better is for a base that --quantization makes"):
        train(arguments(material, tmp_path, export="better"))
    shutil.copytree(material["model"], tmp_path / "stored")
    path = tmp_path / "stored" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="--quantization nf4, and the model's files are quantized already .fp8."):
        train(arguments(material, tmp_path, quantization="nf4", model=tmp_path / "stored"))


def test_subnets_are_located_from_the_first_examples_whatever_the_ranks(ranks, material, tmp_path):
    """Each example is a micro-batch of its own, so that one process and two ranks calibrate by the same ones."""
    found = []
    for name, each in {"alone": 4, "sharded": 2}.items():
        config = tmp_path / f"{name}.yaml"
        config.write_text(
            f"rank_factor: [1, 0.25]\nperiod: 2\nlayers_per_slot: auto\n"
            f"selection: {{located: {{start: importance, calibration_batches: {each}}}}}\n"
        )
        options = {"losia_config": config, "micro_batch": 1, "gradient_accumulation": each, "max_steps": 5}
        if name == "alone":
            train(arguments(material, tmp_path / name, **options))
        else:
            ranks(2, train, arguments(material, tmp_path / name, sharding="fsdp2", **options))
        found.append(losses(tmp_path / name))
    assert len(found[0]) == 5 and found[1] == pytest.approx(found[0], abs=1e-5)
    moves = [json.loads(line) for line in (tmp_path / "sharded" / "subnets.jsonl").read_text().splitlines()]
    assert {move["reason"] for move in moves} >= {"located", "relocalized"}


def test_a_tied_model_that_is_read_in_parts_equals_one_process(ranks, alone, material, tmp_path):
    shutil.copytree(material["model"], tmp_path / "tied")
    settings = LlamaConfig.from_pretrained(material["model"], tie_word_embeddings=True)
    torch.manual_seed(1)
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "tied")
    _, directory = alone(model=tmp_path / "tied")
    words = arguments(material, tmp_path, model=tmp_path / "tied", sharding="fsdp2", samples=1, sample_tokens=3)
    (_, kept), _ = ranks(2, train, words)
    assert kept["sharded"]
    assert losses(tmp_path) == pytest.approx(losses(directory), abs=1e-5)


def test_units_that_share_a_weight_are_refused():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    apart = LlamaForCausalLM(config)
    config.tie_word_embeddings = True
    tied, names = LlamaForCausalLM(config), ("LlamaDecoderLayer", "LlamaMLP", "Embedding")
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight and lm_head\.weight share one weight"):
        _layers(tied, names)
    found = [type(layer).__name__ for layer in _layers(apart, names)]
    assert found == ["LlamaMLP"] * 2 + ["LlamaDecoderLayer"] * 2 + ["Embedding"]  # inner ones first
    assert len(_layers(tied, ())) == 2


@pytest.mark.slow
def test_hsdp_equals_one_process(ranks, alone, material, tmp_path):
    _, directory = alone()
    results = ranks(4, train, arguments(material, tmp_path, sharding="hsdp:2", micro_batch=1, samples=1, sample_tokens=3))
    assert results[0][0]["engine"] == "hsdp:2"
    assert losses(tmp_path) == pytest.approx(losses(directory), abs=1e-5)
    assert all(kept["sharded"] and kept["local"] < 0.6 * kept["whole"] for _, kept in results)


@pytest.mark.parametrize("form", ["chat", "text"])
def test_the_other_forms_of_data_train(material, tmp_path, form):
    words = arguments(
        material,
        tmp_path,
        train_file=material[form],
        eval_file=None,
        validation_size=0.2,
        max_steps=4,
        micro_batch=4,
        no_save=True,
    )
    summary, _ = train(words)
    assert "32 examples" in summary["data"]
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert not (tmp_path / "model").exists()


def test_the_loss_is_the_mean_over_all_target_tokens(material, tmp_path):
    """The first step's rate is 0, and it sees the whole file: its loss is the held-out loss of the same file."""
    words = arguments(
        material, tmp_path, eval_file=material["instruction"], micro_batch=8, gradient_accumulation=5, max_steps=1
    )
    summary, _ = train(words)
    assert losses(tmp_path) == pytest.approx([summary["held_out_loss_before"]], abs=1e-5)


def test_a_run_that_diverges_stops(material, tmp_path):
    words = arguments(material, tmp_path, micro_batch=4, learning_rate=1e30, max_grad_norm=0, losia=None, losia_config=None)
    with pytest.raises(DivergenceError, match=r"the training loss is nan at step \d"):
        train(words)


def test_epochs_and_accumulation_give_the_number_of_steps(material, tmp_path):
    words = arguments(material, tmp_path, max_steps=None, epochs=1.5, micro_batch=4, gradient_accumulation=3, eval_file=None)
    summary, _ = train(words)
    assert summary["steps"] == 5  # 40 examples, 10 batches an epoch, 15 in all, 3 a step
    assert "held_out_loss_after" not in summary


@pytest.mark.parametrize("given", [None, 5e-5])
def test_losia_alone_takes_the_preset_that_fits_the_run_and_says_so(material, tmp_path, given):
    words = arguments(material, tmp_path / "run", losia_config=None, learning_rate=given, max_steps=4)
    notes = train(words)[0]["notes"]
    used = LoSiAConfig.from_file(tmp_path / "run" / "losia_config.json")
    assert replace(used, layers_per_slot="auto", cycles=5) == LoSiAConfig.preset("short") and used.cycles == 1
    assert "preset 'short', as 4 steps are less than 600, two cycles of the published schedule over 3 layers" in notes[0]
    rate = json.loads((tmp_path / "run" / "losia_run.json").read_text())["options"]["learning_rate"]
    if given is None:
        assert rate == 2e-3 and notes[1] == "--learning_rate 0.002, as none was given"
    else:
        assert rate == given and notes[1] == "--learning_rate 5e-05: preset 'short' learned best with 0.002"


def test_long_runs_take_the_published_preset(material):
    options = add_training_arguments(argparse.ArgumentParser()).parse_args(
        arguments(material, "unused", losia_config=None, learning_rate=None)
    )
    config, said = choose_preset(options, 600)
    assert config == LoSiAConfig() and "preset 'published', as 600 steps are not less than 600" in said
    assert choose_preset(options, 599)[0] == LoSiAConfig.preset("short") and choose_preset(options, 2)[0].layers_per_slot == 1
    assert learning_rate_for(options, config) == (5e-5, "") and learning_rate_for(options, None) == (5e-5, "")
