"""Every rank reads its own part of a model's weights: the same values, little memory, and refusals that all ranks share."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import loading as benchmark
from losia_dist.errors import ConfigError
from losia_dist.export.live import _gather
from losia_dist.recipe import script
from losia_dist.recipe.weights.empty import parameters_on_meta
from losia_dist.recipe.weights.model_files import ReadWhole, find_weights
from losia_dist.recipe.weights.renaming import keep_precision
from losia_dist.recipe.weights.streamed import StreamedWeights
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.convert import find_sites
from tests.launch.test_script_engines import alone, losses, options_of, train  # noqa: F401 (a fixture)
from tests.support.cases import only
from tests.support.families import EXPERT_FAMILIES, FAMILIES, tiny_model
from tests.support.launching import ROOT, arguments

ENGINES = {"zero3": {"deepspeed": str(ROOT / "configs" / "deepspeed" / "zero3.json")}, "fsdp2": {"sharding": "fsdp2"}}


def saved(model, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def open_model(directory: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, StreamedWeights]:
    """A model on the meta device, and the source of its weights."""
    config = AutoConfig.from_pretrained(directory)
    stored = find_weights(str(directory), config)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    keep_precision(model, dtype)
    return model, StreamedWeights(model, stored)


def read_in_parts(model, weights, parts: int) -> dict[str, torch.Tensor]:
    """Every parameter, put together from ranges as ranks would read them."""
    whole = {}
    for name, parameter in model.named_parameters():
        values = torch.full((parameter.numel(),), float("nan"), dtype=parameter.dtype)
        step = -(-parameter.numel() // parts)
        for start in range(0, parameter.numel(), step):
            weights.read(weights.name_of(parameter), values[start : start + step], start)
        whole[name] = values.view(parameter.shape)
    return whole


@pytest.mark.parametrize("on_disk, dtype", [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERT_FAMILIES])
def test_parts_put_together_are_what_from_pretrained_reads(tmp_path, family, on_disk, dtype):
    saved(tiny_model(family).to(getattr(torch, on_disk)), tmp_path, max_shard_size="30KB")
    dtype = getattr(torch, dtype)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model, weights = open_model(tmp_path, dtype)
    found = read_in_parts(model, weights, 3)
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert found[name].dtype == parameter.dtype and torch.equal(found[name], parameter), name
    for (name, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert not weights.left_over


def test_a_model_saved_under_another_prefix_is_found(tmp_path):
    model = tiny_model("gpt2")
    saved(model.transformer, tmp_path)  # names without "transformer.", as the published GPT-2 has them
    json_file = tmp_path / "config.json"
    json_file.write_text(json.dumps({**json.loads(json_file.read_text()), "architectures": ["GPT2LMHeadModel"]}))
    empty, weights = open_model(tmp_path, torch.float32)
    for name, values in read_in_parts(empty, weights, 2).items():
        assert torch.equal(values, model.get_parameter(name)), name


def test_parameters_that_an_architecture_keeps_in_fp32_stay_so(tmp_path):
    saved(tiny_model("llama"), tmp_path)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    keep_precision(model, torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"model.layers.{place}.input_layernorm.weight" for place in range(2)}


@pytest.mark.parametrize("reason", ["has no safetensors files", "is quantized", "is an adapter on another model"])
def test_what_cannot_be_read_in_parts_says_why(tmp_path, reason):
    saved(tiny_model("llama"), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    if reason == "is quantized":
        config.quantization_config = {"quant_method": "fp8"}
    elif reason == "is an adapter on another model":
        (tmp_path / "adapter_config.json").write_text("{}")
    else:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ReadWhole, match=reason):
        find_weights(str(tmp_path), config)


# What is on every rank of a sharded run


def gathered(words):
    """Start a run, and put together what the ranks hold: weights, subnets and their places, bit for bit."""
    kept = {}
    start = script._start

    def watched(*args):
        model = args[0]
        assert dist.is_initialized() == all(p.is_meta for p in model.parameters())
        run = start(*args)
        model, access = run.model, resolve_parameters(run.model)
        kept.update({name: values.clone() for name, values in _gather(model, access).items()})
        for layer in find_sites(model):
            kept[f"{layer.name}.subnet"] = access.read_whole(layer.subnet).clone()
            kept[f"{layer.name}.places"] = torch.cat([layer.row_index, layer.col_index])
        return run

    script._start = watched
    try:
        train(words)
    finally:
        script._start = start
    return kept if not dist.is_initialized() or dist.get_rank() == 0 else None


@pytest.fixture(scope="module")
def bf16_material(material, tmp_path_factory):
    """A tied model in bf16, in several files."""
    directory = tmp_path_factory.mktemp("bf16") / "model"
    shutil.copytree(material["model"], directory, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = LlamaConfig.from_pretrained(material["model"], tie_word_embeddings=True)
    torch.manual_seed(2)
    saved(LlamaForCausalLM(settings).to(torch.bfloat16), directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return {**material, "model": directory}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharded_run_starts_from_the_bits_of_one_process(ranks, bf16_material, tmp_path, engine):
    options = {"max_steps": 2, "no_save": True, "eval_file": None}
    expected = gathered(arguments(bf16_material, tmp_path / "alone", micro_batch=4, **options))
    found = ranks(2, gathered, arguments(bf16_material, tmp_path / "run", **options, **ENGINES[engine]))[0]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert values.dtype == found[name].dtype and torch.equal(values, found[name]), name
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.parametrize("engine", only(["fsdp2"], ENGINES.keys()))
def test_full_fine_tuning_under_zero3_and_weights_without_safetensors_work_as_before(
    ranks,
    alone,  # noqa: F811
    material,
    tmp_path,
    engine,
):
    """Without safetensors a note says that the model is read whole; ZeRO-3 trains all weights of a model read in parts."""
    directory = tmp_path / "bin"
    shutil.copytree(material["model"], directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    words = arguments(material, tmp_path / "whole", model=directory, **ENGINES[engine])
    summary = ranks(2, train, words)[0][0]
    assert losses(tmp_path / "whole") == pytest.approx(losses(alone()[1]), abs=1e-5)
    reader = "every rank reads" if engine == "zero3" else "rank 0 reads"
    assert summary["notes"] == [f"{directory} has no safetensors files: {reader} all of it into memory"]
    if engine == "zero3":
        full = {"losia": None, "losia_config": None, "learning_rate": 1e-3}
        ranks(2, train, arguments(material, tmp_path / "full", **full, **ENGINES[engine]))
        assert losses(tmp_path / "full") == pytest.approx(losses(alone(**full)[1]), abs=1e-5)


# Refusals


def without_a_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def with_a_wrong_index(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["absent"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))


def with_a_broken_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": 7}')


def truncated(directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-4])


def with_another_file(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def of_another_shape(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 80}))


def without_a_tensor(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))


BROKEN = {
    without_a_shard: r"model-00002-of-0000\d.safetensors cannot be read: No such file",
    with_a_wrong_index: r"index.json places 'absent' in model-00001-of-0000\d.safetensors, which has no such tensor",
    with_a_broken_index: r"index.json is not an index of safetensors files",
    truncated: r"model-00002-of-0000\d.safetensors has \d+ bytes of at least \d+: it is truncated or damaged",
    with_another_file: r"model-00002-of-0000\d.safetensors has \d+ bytes of at least \d+: it is truncated or damaged",
    of_another_shape: r"mlp.gate_proj.weight is \[77, 36\] in the model's files and \[80, 36\] by its configuration",
    without_a_tensor: r"the model's files hold no values for model.layers.1.mlp.up_proj.weight of LlamaForCausalLM",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_damaged_files_are_one_error_on_every_rank_before_anything_is_sharded(ranks, bf16_material, tmp_path, damage):
    shutil.copytree(bf16_material["model"], tmp_path / "model")
    damage(tmp_path / "model")
    engine = ENGINES["fsdp2" if damage in (truncated, of_another_shape) else "zero3"]
    words = arguments(bf16_material, tmp_path / "run", model=tmp_path / "model", **engine)
    (kind, message), other = ranks.errors(2, train, words)
    assert (kind, message) == other and kind == "ConfigError"
    assert message.startswith(f"--model {tmp_path / 'model'}: ") and re.search(BROKEN[damage], message)


def test_a_parameter_in_no_file_is_refused_by_one_process_too(bf16_material, tmp_path):
    shutil.copytree(bf16_material["model"], tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        kept = {name: values for name, values in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
        save_file(kept, file, metadata={"format": "pt"})
    without_a_tensor(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"hold no values for model.layers.1.mlp.up_proj.weight"):
        train(arguments(bf16_material, tmp_path / "run", model=tmp_path / "model"))


@pytest.mark.parametrize("engine", ENGINES)
def test_machines_with_different_copies_of_the_weights_are_refused(ranks, bf16_material, tmp_path, engine):
    """Each rank would read its part of another model: the mixture has the right shapes, and is worth nothing."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copytree(bf16_material["model"], tmp_path / name / "model")
    file = sorted((tmp_path / "b" / "model").glob("*.safetensors"))[0]
    save_file({name: values + 1 for name, values in load_file(file).items()}, file, metadata={"format": "pt"})
    words = arguments(bf16_material, tmp_path / "run", model=None, **ENGINES[engine])
    errors = ranks.errors(2, train_in_own_directory, [str(tmp_path / name) for name in ("a", "b")], words)
    assert all("model-00001" in message and "the model's files" in message for _, message in errors)


def train_in_own_directory(directories, words):
    """The option is the same on all ranks, and the directory it names is not."""
    before = Path.cwd()
    os.chdir(directories[dist.get_rank()])
    try:
        return train([*words, "--model", "model"])
    finally:
        os.chdir(before)


# Memory

# Bytes that a rank may take beyond the model: code that is first used here, and DeepSpeed's buffers, which do not grow with it.
PROCESS = {"zero3": 56 << 20, "fsdp2": 16 << 20}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_together_hold_the_model_about_once(tmp_path, engine):
    """In processes of its own: what others hold beside the model depends on what ran in them before."""
    parameters = benchmark.write_model(tmp_path, 6, 1024, 2816, 8192)
    found = benchmark.on_ranks(2, benchmark.all_ranks, str(tmp_path), engine, "fp32", False)
    model = 4 * parameters
    assert model > 300e6
    total = sum(rank["loaded, resident"] for rank in found)
    assert total < benchmark.LIMIT * model + 2 * PROCESS[engine]
    assert total > 0.8 * model  # it is there


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_larger_model_keeps_the_bound_without_allowance(tmp_path, engine):
    parameters = benchmark.write_model(tmp_path, 20, 2048, 5632, 32000)
    found = benchmark.on_ranks(4, benchmark.all_ranks, str(tmp_path), engine, "bf16", False)
    assert sum(rank["loaded, resident"] for rank in found) < benchmark.LIMIT * 2 * parameters
