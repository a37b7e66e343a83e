"""The exported directory: a plain model, exactly the trained one, from every engine; and never half a model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups
from losia_dist.checkpoint.names import unwrap
from losia_dist.errors import ConfigError
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


@pytest.mark.parametrize("run", [RUN, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("engine", ["one", "ddp", "zero2", "zero3", "fsdp2", "fsdp2-noreshard"])
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
    assert {path.name for path in Path(target).iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def conductor(**model) -> LoSiA:
    config = LoSiAConfig(rank_factor=0.25, period=2)
    converted = get_losia_model(tiny_llama(**model), config)
    return LoSiA(converted, LoSiAAdamW(losia_parameter_groups(converted, lr=1e-3)), config)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def break_in_the_middle(monkeypatch, losia: LoSiA) -> None:
    """The weights are written, the configuration is not."""
    save = type(losia.model).save_pretrained

    def broken(self, directory, **arguments):
        save(self, directory, **arguments)
        (Path(directory) / "config.json").unlink()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(losia.model), "save_pretrained", broken)


def test_an_interrupted_export_leaves_the_old_model_whole(monkeypatch, tmp_path):
    target = tmp_path / "model"
    export_model(conductor(), target)
    before = contents(target)
    changed = conductor()
    with torch.no_grad():
        changed.layers[0].subnet.add_(1.0)
    break_in_the_middle(monkeypatch, changed)
    with pytest.raises(ConfigError, match="could not be written to .*model: OSError: .*No space left"):
        export_model(changed, target)
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    export_model(changed, target)
    assert contents(target).keys() == before.keys() and contents(target) != before


def test_an_interrupted_first_export_leaves_no_target(monkeypatch, tmp_path):
    losia = conductor()
    break_in_the_middle(monkeypatch, losia)
    with pytest.raises(ConfigError, match="No space left"):
        export_model(losia, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_any_kind_reaches_every_rank(ranks, tmp_path):
    for kind, message in ranks.errors(2, export_what_cannot_be_saved, str(tmp_path / "model")):
        assert kind == "ConfigError" and "could not be written" in message and "temperature" in message


def export_what_cannot_be_saved(directory: str) -> None:
    """A generation configuration that Transformers refuses to save, with a ValueError on the writing rank."""
    losia = conductor()
    losia.model.generation_config.temperature = -1.0
    try:
        export_model(losia, directory)
    finally:
        losia.detach()


def test_old_weights_under_other_names_are_not_left_to_be_loaded(tmp_path):
    """A smaller model had one file; a bigger one comes in several. A loader prefers the single file."""
    target = tmp_path / "model"
    export_model(conductor(), target)
    (target / "tokenizer.json").write_text("{}")
    (target / "notes").mkdir()
    losia = conductor()
    with torch.no_grad():
        losia.layers[0].subnet.add_(1.0)
    save = losia.model.save_pretrained
    losia.model.save_pretrained = lambda directory, **arguments: save(directory, max_shard_size="30KB", **arguments)
    export_model(losia, target)
    assert not (target / "model.safetensors").exists()
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "tokenizer.json").read_text() == "{}" and (target / "notes").is_dir()
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    losia.consolidate()
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, losia.model.get_parameter(name)), name


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("kept")
    for target in (tmp_path / "taken", tmp_path / "taken" / "model"):
        with pytest.raises(ConfigError, match="could not be written to .*taken"):
            export_model(conductor(), target)
    assert (tmp_path / "taken").read_text() == "kept"


def test_what_is_not_a_live_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="export_model"):
        export_model(tiny_llama(), tmp_path / "model")
