"""The exported directory: a plain model, exactly the trained one, from every engine; and never half a model."""

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups
from losia_dist.checkpoint import atomic_files
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.export import model_directory
from losia_dist.export.live import save_whole_model
from tests.support.cases import grid
from tests.support.models import tiny_llama
from tests.support.training import Run, _deepspeed_loop, _plain_loop, global_batches, prepared_model

RUN = Run(steps=7, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "train_norms": True})
TIED = Run(steps=7, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2}, model={"tie_word_embeddings": True})


def train_and_export(engine: str, run: Run, directory: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Train, export in the middle of a slot, and give the weights and logits that the engine computes with."""
    import torch.distributed as dist

    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    loop = _deepspeed_loop if engine.startswith("zero") else _plain_loop
    losia, step, close = loop(engine, prepared_model(run), LoSiAConfig(**run.config), run)
    for micro_batches in global_batches(run):
        step([{name: t.chunk(world)[rank] for name, t in batch.items()} for batch in micro_batches], None)
    assert export_model(losia, directory) == Path(directory)
    model = losia.model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12).unsqueeze(0), use_cache=False).logits
    losia.consolidate()
    plain = unwrap(losia.model)
    names = [name for name, _ in plain.named_parameters() if not name.endswith(".subnet")]
    weights = {name: losia.parameters.read_whole(plain.get_parameter(name)).float().clone() for name in names}
    close()
    return weights, logits


ENGINES = ("one", "ddp", "zero2", "zero3", "fsdp2", "fsdp2-noreshard")
OFTEN = ["one-untied", "one-tied", "ddp-untied", "zero2-tied", "zero3-tied", "fsdp2-untied", "fsdp2-noreshard-tied"]


@pytest.mark.parametrize("engine, run", grid(ENGINES, {"untied": RUN, "tied": TIED}, often=OFTEN))
def test_every_weight_is_the_trained_one_to_the_last_bit(ranks, tmp_path, engine, run):
    target = str(tmp_path / "model")
    result = train_and_export("one", run, target) if engine == "one" else ranks(2, train_and_export, engine, run, target)[0]
    weights, logits = result
    loaded, report = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    names = dict(loaded.named_parameters())
    assert set(names) == set(weights)
    start = dict(tiny_llama(**run.model).named_parameters())
    for name, weight in weights.items():
        assert torch.equal(names[name], weight), name
        if "proj" in name or "lm_head" in name:
            assert not torch.equal(names[name], start[name]), f"{name} did not train"
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (run is TIED)
    with torch.no_grad():
        again = loaded.eval()(input_ids=torch.arange(12).unsqueeze(0), use_cache=False).logits
    assert torch.allclose(again, logits, atol=1e-5)
    config = json.loads((Path(target) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {path.name for path in Path(target).iterdir()} == {
        "config.json",
        "generation_config.json",
        "README.md",
        "model.safetensors",
    }


def conductor(**model) -> LoSiA:
    config = LoSiAConfig(rank_factor=0.25, period=2)
    converted = get_losia_model(tiny_llama(**model), config)
    return LoSiA(converted, LoSiAAdamW(losia_parameter_groups(converted, lr=1e-3)), config)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def break_in_the_middle(monkeypatch) -> None:
    """The configuration and some of the weights are written; then the disk is full."""
    write = atomic_files.TensorWriter.write

    def broken(self, name, tensor):
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(atomic_files.TensorWriter, "write", broken)


def test_an_interrupted_export_leaves_the_old_model_whole(monkeypatch, tmp_path):
    target = tmp_path / "model"
    export_model(conductor(), target)
    before = contents(target)
    changed = conductor()
    with torch.no_grad():
        changed.sites[0].subnet.add_(1.0)
    break_in_the_middle(monkeypatch)
    with pytest.raises(ConfigError, match="could not be written to .*model: OSError: .*No space left"):
        export_model(changed, target)
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    export_model(changed, target)
    assert contents(target).keys() == before.keys() and contents(target) != before


def test_an_interrupted_first_export_leaves_no_target(monkeypatch, tmp_path):
    losia = conductor()
    break_in_the_middle(monkeypatch)
    with pytest.raises(ConfigError, match="No space left"):
        export_model(losia, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where, words", [("configuration", "temperature"), ("weights", "cut wire"), ("tokenizer", "cut wire")])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_an_error_of_any_kind_reaches_every_rank(ranks, tmp_path, engine, where, words):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    for kind, message in ranks.errors(2, export_what_cannot_be_saved, engine, where, str(tmp_path / "model")):
        assert kind == "ConfigError" and "could not be written" in message and words in message
        assert message.startswith("rank 0 of 2: ")
    assert contents(tmp_path) == {"model/config.json": b"old"}


def export_what_cannot_be_saved(engine: str, where: str, directory: str) -> None:
    """Transformers refuses a generation configuration with a ValueError; or writing fails, on rank 0 alone."""
    import torch.distributed as dist

    losia, _, close = _plain_loop(engine, prepared_model(RUN), LoSiAConfig(**RUN.config), RUN)
    kept = atomic_files.TensorWriter.write, model_directory.copy_beside

    def broken(*_):
        raise OSError("cut wire")

    if where == "configuration":
        unwrap(losia.model).generation_config.temperature = -1.0
    if where == "weights" and dist.get_rank() == 0:
        atomic_files.TensorWriter.write = broken
    if where == "tokenizer":
        model_directory.copy_beside = broken
    try:
        export_model(losia, directory, base_model=str(Path(directory).parent))
    finally:
        atomic_files.TensorWriter.write, model_directory.copy_beside = kept
        close()


def export_and_watch_memory(engine: str, directory: str) -> tuple[int, int, int]:
    """(most bytes of whole tensors that were there at once, bytes of the largest one, of the model)."""
    loop = _deepspeed_loop if engine.startswith("zero") else _plain_loop
    losia, _, close = loop(engine, prepared_model(RUN), LoSiAConfig(**RUN.config), RUN)
    read, living, most = type(losia.parameters).read_whole, {}, [0]

    def watched(self, parameter):
        whole = read(self, parameter)
        key = len(sizes)
        sizes.append(whole.untyped_storage().nbytes())
        living[key] = weakref.finalize(whole, living.pop, key)
        most[0] = max(most[0], sum(sizes[key] for key in living))
        return whole

    losia.consolidate()
    sizes: list[int] = []
    type(losia.parameters).read_whole = watched
    try:
        save_whole_model(losia.model, directory, losia.parameters)
    finally:
        type(losia.parameters).read_whole = read
        close()
    return most[0], max(sizes), sum(sizes)


@pytest.mark.parametrize("engine", ["one", "ddp", "zero3", "fsdp2"])
def test_one_weight_is_in_memory_at_a_time(ranks, tmp_path, engine):
    target = str(tmp_path / "model")
    alone = engine == "one"
    found = [export_and_watch_memory(engine, target)] if alone else ranks(2, export_and_watch_memory, engine, target)
    for most, largest, model in found:
        assert most <= 2 * largest < model / 5  # the one that is written, and the next while it replaces it


@pytest.mark.parametrize("before, after", [(10**9, 30_000), (30_000, 10**9), (30_000, 60_000)])
def test_old_weights_under_other_names_are_not_left_to_be_loaded(monkeypatch, tmp_path, before, after):
    """Models come in one file or in several, and a loader prefers the single file."""
    target = tmp_path / "model"
    monkeypatch.setitem(model_directory.write_model_directory.__kwdefaults__, "shard_bytes", before)
    export_model(conductor(), target)
    (target / "tokenizer.json").write_text("{}")
    (target / "notes").mkdir()
    losia = conductor()
    with torch.no_grad():
        losia.sites[0].subnet.add_(1.0)
    monkeypatch.setitem(model_directory.write_model_directory.__kwdefaults__, "shard_bytes", after)
    export_model(losia, target)
    found = {path.name for path in target.glob("model*")}
    stored = {"model.safetensors"}
    if after < 10**9:
        stored = set(json.loads((target / "model.safetensors.index.json").read_text())["weight_map"].values())
        assert len(stored) > 1
        stored.add("model.safetensors.index.json")
    assert found == stored
    assert (target / "tokenizer.json").read_text() == "{}" and (target / "notes").is_dir()
    assert not (target / ".incomplete").exists()
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    losia.consolidate()
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, losia.model.get_parameter(name)), name


def test_a_model_that_is_stored_under_other_names_is_exported_as_its_class_stores_it(tmp_path):
    """Experts are one tensor in memory and many in the files."""
    torch.manual_seed(0)
    shape = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_local_experts": 3, "vocab_size": 97}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads))
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = LoSiAConfig(rank_factor=0.25, period=2, target_modules=["q_proj", "v_proj"])
    converted = get_losia_model(model, config)
    losia = LoSiA(converted, LoSiAAdamW(losia_parameter_groups(converted, lr=1e-3)), config)
    with torch.no_grad():
        losia.sites[0].subnet.add_(1.0)
    export_model(losia, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as stored:
        assert not set(stored.keys()) <= plain.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    changed = {name for name, weight in loaded.state_dict().items() if not torch.equal(weight, plain[name])}
    assert changed == {f"{losia.sites[0].name}.weight"}


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("kept")
    for target in (tmp_path / "taken", tmp_path / "taken" / "model"):
        with pytest.raises(ConfigError, match="could not be written to .*taken"):
            export_model(conductor(), target)
    assert (tmp_path / "taken").read_text() == "kept"


def test_the_models_own_way_to_save_is_refused(tmp_path):
    """It would write the weights that the model had before training, without a word."""
    losia = conductor()
    with torch.no_grad():
        losia.sites[0].subnet.add_(1.0)
    trainer = Trainer(model=losia.model, args=TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    ways = {
        "the model": losia.model.save_pretrained,
        "a model in it": losia.model.model.save_pretrained,
        "a copy": copy.deepcopy(losia.model).save_pretrained,
        "a plain Trainer": trainer.save_model,
    }
    for name, save in ways.items():
        with pytest.raises(UnsupportedError, match=r"export_model\(losia, directory\)"):
            save(tmp_path / name)
    export_model(losia, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")  # other models of the class keep theirs
    assert torch.equal(loaded.get_submodule(losia.sites[0].name).weight, losia.sites[0].weight)


def test_what_is_not_a_live_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="export_model"):
        export_model(tiny_llama(), tmp_path / "model")
